import gc
import weakref

from actors.config import EngineConfig
from actors.transformers_engine import TransformersEngine
from deploy.tiny_model import build_model, build_tokenizer
from streaming.records import Sampling, Version
from tests.builders import EOS, tokens_of


async def test_a_closed_engine_holds_no_model() -> None:
    """It used to keep it until its last user let it go: an engine and its replacement filled the GPU together."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    held = weakref.ref(model)
    engine = TransformersEngine(
        model, tokenizer, Version(1, 0), eos=frozenset([EOS]), config=EngineConfig(kind="transformers")
    )
    del model
    await engine.generate(tokens_of("1+1="), num_candidates=2, sampling=Sampling(max_tokens=2), request_id="test")
    await engine.close()
    gc.collect()
    assert held() is None
