"""A model learns to stop at its template's end of turn, and what is exported names that token beside the base's own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer

from bft_megatron.commands.request import Request
from bft_megatron.errors import FieldError, UserError
from bft_megatron.hf import stops
from bft_megatron.hf.architectures import read_config
from bft_megatron.hf.generate import generate
from bft_megatron.recipe import reader
from bft_megatron.run.folder import RunFolder
from bft_megatron.run.prepared import RunRows, prepare_rows
from tests.helpers.commands import run_command
from tests.helpers.material import TINY

ROW = {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]}
IM_END, END_OF_TEXT = 2, 500


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as they are published: it stops at <|endoftext|>; the tokenizer has ChatML's tokens too."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((TINY / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((TINY / "config.json").read_text())
    config |= {"vocab_size": 512, "eos_token_id": END_OF_TEXT, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rows.jsonl").write_text(json.dumps(ROW))
    return folder


def words(base: Path, output: Path, *more: str) -> list[str]:
    """A recipe on the base's one conversation."""
    return [
        "recipes/tiny.yaml",
        f"model={base}",
        f"data.train={base / 'rows.jsonl'}",
        "data.valid=null",
        "data.seq_length=64",
        "objective.name=sft",
        "train.global_batch_size=1",
        "train.lr=1e-2",
        "train.warmup_iterations=0",
        f"output={output}",
        *more,
    ]


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        assert run_command(patch, "train", *words(base, output, "train.iterations=30")) == 0
    return RunFolder(output)


def test_the_learned_end_of_turn_is_a_stop_token_of_the_export(
    base: Path, trained: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(monkeypatch, "export", trained.root, tmp_path / "out") == 0
    said = f"stop tokens in generation_config.json: <|endoftext|> ({END_OF_TEXT}), <|im_end|> ({IM_END})"
    assert said in capfd.readouterr().out
    read = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert read.eos_token_id == [END_OF_TEXT, IM_END]
    assert read.pad_token_id == 0  # what config.json says, which transformers does not look at any more
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|endoftext|>"
    assert read_config(tmp_path / "out") == read_config(base)
    assert generate(tmp_path / "out", "Is it?", 20) == "Yes."
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tokenizer.apply_chat_template(ROW["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    with_base = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=END_OF_TEXT)
    assert with_base.shape[1] == inputs["input_ids"].shape[1] + 20  # the base's own token alone does not end it


def test_prepare_says_where_template_and_model_disagree(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):  # the second finds the rows prepared
        assert run_command(monkeypatch, "prepare", *words(base, tmp_path / "run", "lora={rank: 2}")) == 0
        said = capfd.readouterr().out
        assert f"warning: learned turns end in <|im_end|> ({IM_END}), where {base} itself does not stop" in said
        assert f"(its eos_token_id: <|endoftext|> ({END_OF_TEXT}))" in said
        assert f"requests need stop_token_ids [{IM_END}]" in said
    (tmp_path / "text.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    template = f"data.chat_template={tmp_path / 'text.jinja'}"
    assert run_command(monkeypatch, "prepare", *words(base, tmp_path / "run", template)) == 0
    said = capfd.readouterr().out
    assert "warning: 1 of the 1 learned turns of rows end in no control token" in said
    assert "learned turns end in" not in said
    cut = tmp_path / "cut.jinja"
    turn = "{% generation %}so<|im_end|>{{ m.content }}<|im_end|>{% endgeneration %}"
    cut.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}" + turn + "{% else %}<|im_start|>{% endif %}{% endfor %}"
    )
    assert run_command(monkeypatch, "prepare", *words(base, tmp_path / "run", f"data.chat_template={cut}")) == 0
    said = capfd.readouterr().out
    assert f"learned turns of rows end in <|im_end|> ({IM_END}) too, which is no stop token of the exports" in said
    assert "itself does not stop" not in said
    tiny = words(TINY, tmp_path / "tiny", f"data.train={TINY / 'train.jsonl'}", "data.seq_length=256")
    assert run_command(monkeypatch, "prepare", *tiny) == 0
    assert "warning" not in capfd.readouterr().out


def test_adapters_and_the_merged_model_name_it_too(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "lora"
    assert run_command(monkeypatch, "train", *words(base, run, "lora={rank: 2}", "train.iterations=1")) == 0
    for name, merge in (("adapter", ()), ("merged", ("--merge",))):
        assert run_command(monkeypatch, "export", run, tmp_path / name, *merge) == 0
        assert f"<|endoftext|> ({END_OF_TEXT}), <|im_end|> ({IM_END})" in capfd.readouterr().out
        assert transformers.GenerationConfig.from_pretrained(tmp_path / name).eos_token_id == [END_OF_TEXT, IM_END]
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / name).chat_template
    assert not (tmp_path / "adapter" / "config.json").exists()


def test_a_run_that_begins_with_another_runs_model_keeps_what_that_one_learned(
    trained: RunFolder, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    changes = (f"data.chat_template={tmp_path / 'text.jinja'}", "init=pretrained", "train.iterations=1")
    again = words(trained.root, tmp_path / "run", f"data.train={base / 'rows.jsonl'}", *changes)
    assert run_command(monkeypatch, "train", *again) == 0
    assert stops.stop_tokens(tmp_path / "run" / "model") == [END_OF_TEXT, IM_END]
    assert "warning: 1 of the 1 learned turns" in capfd.readouterr().out


def test_a_run_whose_folder_is_older_than_this_goes_on(base: Path, trained: RunFolder, tmp_path: Path) -> None:
    """Rows that name no ends add none; those prepared anew have the same hash and add theirs."""
    folder = RunFolder(shutil.copytree(trained.root, tmp_path / "run"))
    (folder.model / stops.FILE).unlink()
    text = folder.config.read_text()
    folder.config.write_text("".join(x for x in text.splitlines(True) if "special_tokens" not in x))
    made = reader.load(folder.config, [f"output={folder.root}"])
    folder.check_continues(made)
    with pytest.raises(FieldError, match=r"with data\.special_tokens None, not"):
        folder.check_continues(replace(made, data=replace(made.data, special_tokens=["<|im_end|>"])))
    request = Request(folder.config, [], made, read_config(base))
    rows = prepare_rows(made, base, 512)
    request.describe_run(_without_stops(rows))
    assert not (folder.model / stops.FILE).exists()
    request.describe_run(rows)
    assert stops.stop_tokens(folder.model) == [END_OF_TEXT, IM_END]


def _without_stops(rows: RunRows) -> RunRows:
    (part,) = rows.train.parts
    parts = (replace(part, prepared=replace(part.prepared, counts=replace(part.prepared.counts, ends={}))),)
    return replace(rows, train=replace(rows.train, parts=parts))


@pytest.mark.parametrize(
    ("config", "generation", "learned", "written"),
    [
        ({"eos_token_id": 7, "bos_token_id": 1}, None, [3], {"eos_token_id": [7, 3], "bos_token_id": 1}),
        ({"eos_token_id": [7, 5]}, None, [9, 3, 5], {"eos_token_id": [7, 5, 3, 9]}),
        ({"eos_token_id": 7}, {"eos_token_id": 8, "top_p": 0.9}, [7], {"eos_token_id": [8, 7], "top_p": 0.9}),
        ({"eos_token_id": 7}, {"top_p": 0.9}, [3], {"top_p": 0.9, "eos_token_id": [7, 3]}),
        ({}, None, [3], {"eos_token_id": [3]}),
        ({"eos_token_id": None}, {"eos_token_id": None}, [3], {"eos_token_id": [3]}),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 7]}, [7, 8], None),
        ({"eos_token_id": 7}, None, [7], None),
        ({"eos_token_id": 7}, None, [], None),
    ],
)
def test_the_own_stop_tokens_come_first_and_all_else_stays(
    config: dict, generation: dict | None, learned: list[int], written: dict | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / stops.FILE).write_text(json.dumps(generation))
    text = stops.with_stops(tmp_path, learned)
    assert (text if text is None else json.loads(text)) == written


def test_a_generation_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / stops.FILE).write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json:1: not JSON"):
        stops.stop_tokens(tmp_path)
