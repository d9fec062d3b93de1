"""Accuracy of any list of checkpoints on any task source, through vLLM: greedy or avg@k.

python jobs/evaluate.py models.student=runs/quickstart/base/export
"""

import sys

from raysys import job
from raysys.config.runs import EvaluateConfig

if __name__ == "__main__":
    sys.exit(job.main("evaluate", EvaluateConfig))
