# /// script
# requires-python = ">=3.11"
# dependencies = ["hfquant[service]"]
# ///
"""A fleet, or what a webhook tells of it, on Hugging Face Jobs.

    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN workflows/job.py https://.../fleet.yaml
    hf jobs scheduled uv run @daily --secrets HF_TOKEN workflows/job.py your-name/fleet

The argument is a file, or a dataset of the Hub that holds `fleet.yaml`.  Begun by a webhook (`hfquant webhooks create
--job ID`), only the model that it tells of is looked at.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def manifest(given: str) -> Path:
    """The fleet's file on this machine."""
    if Path(given).is_file():
        return Path(given)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(given, repo_type="dataset", allow_patterns=["*.yaml", "*.yml"])) / "fleet.yaml"


def only() -> list[str]:
    """The model of the webhook that began this Job, where one did."""
    payload = os.environ.get("WEBHOOK_PAYLOAD")
    if not payload:
        return []
    from hfquant.conversion.fleet.webhook import read

    arrivals = read(json.loads(payload))
    if not arrivals:
        sys.exit(0)  # a pull request, a discussion, a deleted branch: nothing to do
    return [argument for arrival in arrivals for argument in ("--only", arrival.repo)]


def main() -> None:
    fleet = ["--manifest", str(manifest(sys.argv[1] if len(sys.argv) > 1 else "fleet.yaml"))]
    for command in (["fleet", "apply", *fleet, *only()], ["worker", "--until-idle"], ["fleet", "plan", *fleet]):
        done = subprocess.run([sys.executable, "-m", "hfquant", *command], check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
