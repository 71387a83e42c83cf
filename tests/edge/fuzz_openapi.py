"""Random requests made from our own OpenAPI, by schemathesis, against an edge with a scripted scheduler.

    python -m tests.edge.fuzz_openapi 5000

sends at least so many and exits with 1 if one of them is answered by a server error.
"""

import asyncio
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.edge.scripted_scheduler import MODEL, PATIENCE_S, stand

METHODS = ("get", "post", "delete", "put", "patch")


async def fuzz(num_cases: int, seed: int) -> tuple[int, str]:
    """How many requests were sent, and what schemathesis says of their faults: empty where there is none."""
    async with stand() as it:
        async with it.http() as http:
            document = (await http.get("/openapi.json")).json()
        num_operations = sum(method in path for path in document["paths"].values() for method in METHODS)
        for schema in document["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):
                schema["properties"]["model"] = {"enum": [MODEL]}  # or most requests would end at an unknown model
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "openapi.json"
            path.write_text(json.dumps(document))
            return await _run(path, it.url, -(-num_cases // num_operations), seed)


async def _run(path: Path, url: str, num_examples: int, seed: int) -> tuple[int, str]:
    flags = ("--checks", "not_a_server_error", "--mode", "all", "--phases", "fuzzing", "--continue-on-failure", "--no-color")
    numbers = ("--max-examples", str(num_examples), "--seed", str(seed), "--generation-database", "none")
    patience = ("--request-timeout", str(PATIENCE_S), "--suppress-health-check", "all")  # a slow machine is no fault of the server
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", str(path), "--url", url, *flags, *numbers, *patience]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=path.parent, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    said = output.decode()
    counted: Any = re.search(r"([\d,]+) generated", said)
    assert counted, said
    return int(counted[1].replace(",", "")), "" if process.returncode == 0 else said


def main() -> int:
    num_cases, faults = asyncio.run(fuzz(int(sys.argv[1]), seed=1))
    print(f"{num_cases} cases, {'server errors:' if faults else '0 server errors'}\n{faults}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
