"""The model that benchmarks serve: a full-size configuration with random weights on GPUs, a tiny model on CPUs."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_spark.files import configs_folder
from vllm_spark.models.tiny import make_tiny_model

MODELS = {"cuda": "qwen3-30b-a3b-int4", "cpu": "tiny-moe"}
"""By device: a name of `configs/models`, or `tiny-moe`."""


def make_model(folder: Path, name: str) -> Path:
    """A folder with the configuration `name` of `configs/models` and a tokenizer of as many words."""
    if name == MODELS["cpu"]:
        return make_tiny_model(folder, "moe")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder.mkdir()
    text = (configs_folder() / "models" / name / "config.json").read_text()
    (folder / "config.json").write_text(text)
    tokenizer = Tokenizer(WordLevel({f"t{token}": token for token in range(json.loads(text)["vocab_size"])}, "t0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "eos_token": "t1"})
    )
    return folder
