"""Supervised fine-tuning through the loop's trainer and data rooms; also makes small models from scratch.

python jobs/sft.py --config jobs/configs/sft/local.yaml steps=100
"""

import sys

from raysys import job
from raysys.config.runs import SftConfig

if __name__ == "__main__":
    sys.exit(job.main("sft", SftConfig))
