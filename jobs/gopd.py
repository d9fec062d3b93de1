"""On-policy distillation from one or several teachers: OPD and ExOPD (arXiv 2602.12125).

python jobs/gopd.py --config jobs/configs/gopd/local.yaml reward_scale=1.25
"""

import sys

from raysys import job
from raysys.config.runs import GopdConfig

if __name__ == "__main__":
    sys.exit(job.main("gopd", GopdConfig))
