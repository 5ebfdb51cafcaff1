"""A process that holds a vLLM engine until it is killed, and says so: `python -m tests.engine_process MODEL`."""

import asyncio
import sys
from pathlib import Path

from actors.config import EngineConfig
from actors.engine import start_engine
from streaming.records import Version

READY = "the engine runs"


async def hold(directory: Path) -> None:
    engine = await start_engine(EngineConfig(num_threads=1), directory, Version(1, 0), policy="policy")
    print(READY, flush=True)
    await asyncio.Event().wait()
    await engine.close()


if __name__ == "__main__":
    asyncio.run(hold(Path(sys.argv[1])))
