"""GRPO and CalibAdv on a search service (arXiv 2604.18235).

python jobs/search_agent.py --config jobs/configs/search_agent/local.yaml search.url=http://127.0.0.1:8001
python jobs/search_agent.py --config jobs/configs/search_agent/local.yaml --study ablation --seeds 0,1,2
"""

import sys

from raysys import job
from raysys.config.agents import SearchAgentConfig
from raysys.studies.search_agent import STUDIES

if __name__ == "__main__":
    sys.exit(job.main("search_agent", SearchAgentConfig, studies=STUDIES))
