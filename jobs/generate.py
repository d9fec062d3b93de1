"""Teachers' answers to a task source, through vLLM and Ray Data, as data that `data.path` of the other jobs reads.

python jobs/generate.py --config jobs/configs/generate/local.yaml samples=2 keep=correct
"""

import sys

from raysys import job
from raysys.config.runs import GenerateConfig

if __name__ == "__main__":
    sys.exit(job.main("generate", GenerateConfig))
