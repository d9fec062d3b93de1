"""Real text from this machine, and a tokenizer trained on it: what a first pretraining run learns from.

python jobs/local_text.py --config jobs/configs/local_text/local.yaml megabytes=4
"""

import sys

from raysys import job
from raysys.config.pretraining import LocalTextConfig

if __name__ == "__main__":
    sys.exit(job.main("local_text", LocalTextConfig))
