"""Look the pinned packages up in a list of known vulnerabilities (OSV's, by pip-audit).

    python tools/audit.py

The exit code is 0 if every package was looked up and none is listed, 1 if one is, 2 if the list could not be asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PINS = Path(__file__).parents[1] / "constraints.txt"


def verdict(report: dict[str, Any] | None, reason: str) -> tuple[int, str]:
    """Return exit code and message for pip-audit's report; None where it wrote none, for the reason given."""
    if report is None:
        return 2, f"NOT AUDITED: the list of vulnerabilities could not be asked ({reason})"
    packages = report["dependencies"]
    # pip-audit counts what it could not look up as fine.
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    listed = [
        f"  {package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or '-'}"
        for package in packages
        for found in package.get("vulns", [])
    ]
    if listed:
        return 1, "\n".join([f"{len(listed)} known vulnerabilities:", *listed])
    if skipped or not packages:
        return 2, f"NOT AUDITED: {len(skipped)} of {len(packages)} packages could not be looked up: {skipped[:5]} ..."
    return 0, f"{len(packages)} packages looked up, no known vulnerability"


def main() -> int:
    """Run pip-audit; print the verdict."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", "osv", "--progress-spinner", "off", "--timeout", "30", "--format", "json"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        done = subprocess.run([*command, "--output", str(path)], capture_output=True, text=True, check=False)
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    code, message = verdict(report, (done.stderr.strip().splitlines() or ["no reason given"])[-1])
    print(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
