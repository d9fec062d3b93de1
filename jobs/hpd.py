"""Hybrid-policy distillation on data, and its baselines (loss=sft, seqkd, rkld, jsd), through the loop's trainer, scorer and data rooms.

python jobs/hpd.py --config jobs/configs/hpd/local.yaml steps=100
"""

import sys

from raysys import job
from raysys.config.runs import HpdConfig

if __name__ == "__main__":
    sys.exit(job.main("hpd", HpdConfig))
