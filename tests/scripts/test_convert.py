"""scripts.convert: round trips through files, bad input, and an export that runs where this repository is not."""

import gc
import json
import re
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.model_file import read_model_file
from model.hf import parameter_shapes, to_theirs
from model.transformer import Transformer
from scripts import convert as door
from tests.model.helpers import pack
from tests.model.test_huggingface import FAMILIES, ROPES, make_theirs
from tests.train.helpers import execute
from train.weights import INDEX, WHOLE, WeightFolder


@pytest.fixture
def convert(monkeypatch):
    """Runs the program in this process."""
    monkeypatch.chdir(Path.cwd())

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        door.main()

    return run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tied Llama with llama3 scaling, as transformers saves it."""
    folder = tmp_path_factory.mktemp("llama") / "hf"
    make_theirs("llama", ROPES["llama3"], tied=True).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "hf"))


# --- round trips ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rope", "dtype", "sharded"),
    [
        ("llama", "llama3", torch.bfloat16, True),
        ("llama", "default", torch.float16, False),
        ("mistral", "linear", torch.float32, True),
        ("qwen2", "yarn", torch.bfloat16, False),
        ("qwen3", "default", torch.float32, False),
    ],
)
def test_there_and_back_every_bit_is_the_same(convert, tmp_path, family, rope, dtype, sharded):
    theirs = make_theirs(family, ROPES[rope], tied=family.startswith("qwen")).to(dtype)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB" if sharded else "5GB")
    assert (tmp_path / "hf" / INDEX).is_file() is sharded
    convert("from_hf", tmp_path / "hf", tmp_path / "ours")
    convert("to_hf", tmp_path / "ours", tmp_path / "back", "shard_bytes=20000")
    assert (tmp_path / "ours" / WHOLE).is_file() and (tmp_path / "back" / INDEX).is_file()
    expected = tensors(tmp_path / "hf")
    assert_same(tensors(tmp_path / "back"), expected)
    assert_same(tensors(tmp_path / "ours"), {ours: expected[to_theirs(ours)] for ours in tensors(tmp_path / "ours")})
    assert not list((tmp_path / "back").glob("*.py"))
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    assert after.dtype == before.dtype == dtype and isinstance(after, FAMILIES["llama" if family == "mistral" else family][1])
    tokens = pack([150])[0][None]
    with torch.no_grad():
        found, expected_logits = (model(tokens).logits for model in (after, before))
    assert torch.equal(found, expected_logits)
    convert("from_hf", tmp_path / "back", tmp_path / "ours_again")  # an index of ours is read as theirs
    assert (tmp_path / "ours_again/model.json").read_text() == (tmp_path / "ours/model.json").read_text()
    assert_same(tensors(tmp_path / "ours_again"), tensors(tmp_path / "ours"))


def test_files_of_early_llamas_and_a_written_out_tied_head_are_read(convert, llama, copied, tmp_path):
    content = tensors(copied)
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    save_file(content, copied / WHOLE)
    convert("from_hf", copied, tmp_path / "ours")
    convert("to_hf", tmp_path / "ours", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(llama))


def test_what_goes_along_and_what_is_said(convert, copied, tmp_path, capsys):
    for name in ("tokenizer_config.json", "chat_template.jinja", "unrelated.txt"):
        (copied / name).write_text("{}")
    (copied / "generation_config.json").unlink()
    convert("from_hf", copied, tmp_path / "ours")
    said = capsys.readouterr().out
    assert "ours: 20 tensors" in said and "F32" in said and "scaling llama3" in said
    assert json.loads((tmp_path / "ours/generation_config.json").read_text())["bos_token_id"] == 1
    assert (tmp_path / "ours/chat_template.jinja").is_file() and not (tmp_path / "ours/unrelated.txt").exists()
    convert("to_hf", tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["bos_token_id"] == 1
    assert "LlamaForCausalLM: AutoModelForCausalLM.from_pretrained(DIR)" in capsys.readouterr().out


@pytest.mark.parametrize("direction", ["from_hf", "to_hf"])
def test_no_more_than_a_shard_is_in_memory(convert, tmp_path, monkeypatch, direction):
    make_theirs("llama", ROPES["default"], num_hidden_layers=6).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    if direction == "to_hf":
        convert("from_hf", tmp_path / "hf", tmp_path / "in")
    shard, alive, most, reads = 16_000, 0, 0, 0
    plain = WeightFolder.read

    def read(self, name):
        nonlocal alive, most, reads
        tensor = plain(self, name)
        size = tensor.nbytes

        def free():
            nonlocal alive
            alive -= size

        alive, reads = alive + size, reads + 1
        most = max(most, alive)
        weakref.finalize(tensor, free)
        return tensor

    monkeypatch.setattr(WeightFolder, "read", read)
    gc.collect()
    source = tmp_path / ("hf" if direction == "from_hf" else "in")
    convert(direction, source, tmp_path / "out", f"shard_bytes={shard}")
    sizes = [tensor.nbytes for tensor in tensors(tmp_path / "out").values()]
    assert reads == len(sizes) and sum(sizes) > 5 * shard
    assert most <= shard and alive == 0


# --- bad input ------------------------------------------------------------------------------------------------------------------------


def _change(name: str, value: torch.Tensor | None):
    def damage(folder: Path) -> None:
        content = tensors(folder)
        if value is None:
            del content[name]
        else:
            content[name] = value
        save_file(content, folder / WHOLE)

    return damage


def _to_pickle(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    content = (folder / WHOLE).read_bytes()
    (folder / WHOLE).write_bytes(content[:-100])


def _index(weight_map: object):
    def damage(folder: Path) -> None:
        (folder / WHOLE).rename(folder / "a.safetensors")
        names = tensors(folder)
        placed = weight_map if not callable(weight_map) else weight_map(names)
        (folder / INDEX).write_text(json.dumps({"weight_map": placed}))

    return damage


def _written(text: str):
    return lambda folder: (folder / "config.json").write_text(text)


def _config(**changes: object):
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_change(UP, None), rf"hf: {UP} \[48, 32\] is missing, config.json asks for it; fetch the files again, or correct config.json"),
        (_change(UP, torch.zeros(48, 31)), rf"hf: {UP} has shape \[48, 31\], config.json makes it \[48, 32\]"),
        (_change(UP, torch.zeros(0, 32)), rf"{UP} has shape \[0, 32\], config.json makes it \[48, 32\]; .*correct config.json"),
        (_change(UP, torch.full((48, 32), torch.nan)), rf"{WHOLE}: {UP} has 1,536 of 1,536 values that are NaN or infinite; fetch"),
        (_change(UP, torch.zeros(48, 32).index_fill(0, torch.tensor(1), -torch.inf)), rf"{UP} has 32 of 1,536 values that are NaN or inf"),
        (_change("lm_head.weight", torch.full((96, 32), torch.nan).bfloat16()), "lm_head.weight has 3,072 of 3,072 values that are NaN"),
        (_change("model.layers.2.mlp.up_proj.weight", torch.zeros(48, 32)), r"model.layers.2.mlp.up_proj.weight \[48, 32\] has no place"),
        (_change("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)), r"q_proj.bias \[64\] has no place in the model of config.json"),
        (_change("embedding.weight", torch.zeros(96, 32)), r"embedding.weight \[96, 32\] has no place"),
        (_change("lm_head.weight", torch.zeros(96, 32)), "is not model.embed_tokens.weight, .*tie_word_embeddings=True; set it to false"),
        (_config(tie_word_embeddings=False), "lm_head.weight is missing, .*tie_word_embeddings=False.*; set it to true"),
        (_config(num_hidden_layers=10**30), f"config.json: num_hidden_layers={10**30}: must be at most 4096"),
        (_change(UP, torch.zeros(48, 32, dtype=torch.int8)), f"{UP} is I8; accepted: F64, F32, BF16, F16; .*dequantised"),
        (_to_pickle, r"pytorch_model.bin: is a pickle, which may run any code .*save_pretrained\(OUT\)"),
        (lambda folder: (folder / WHOLE).unlink(), f"holds neither {WHOLE} nor {INDEX}"),
        (_cut, f"{WHOLE}: is damaged, or not a safetensors file"),
        (
            _index(lambda names: dict.fromkeys(names, "a.safetensors") | {UP: "b.safetensors"}),
            f"a.safetensors: holds {UP}, which .* puts into b",
        ),
        (_index(lambda names: dict.fromkeys(names, "a.safetensors") | {"x": "a.safetensors"}), "a.safetensors: does not hold x, which"),
        (
            _index(lambda names: {name: "a.safetensors" for name in names if name != UP}),
            f"a.safetensors: holds {UP}, which .* puts into no file; fetch",
        ),
        (_index({"x": "b.safetensors"}), r"b.safetensors: cannot be read \(No such file or directory\); fetch the file"),
        (_index({"x": f"{'b' * 300}.safetensors"}), r"b.safetensors: cannot be read \(File name too long\)"),
        (_index({"x": "../a.safetensors"}), r"weight_map must map tensors to safetensors files of this folder, not to '../a"),
        (_index({"x": 1}), f"{INDEX}: weight_map must map tensors to safetensors files of this folder, not to 1; fetch it again"),
        (_index([]), f"{INDEX}: weight_map must map tensors to safetensors files of this folder; fetch it again"),
        (_written("{"), "config.json: is not JSON"),
        (_written("[" * 100_000), "config.json: is not JSON"),
        (_written("[]"), "config.json: must hold an object, it holds a list"),
        (_written('{"model_type": "gpt2"}'), "config.json: model_type=gpt2: no family"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
    ],
)
def test_a_bad_folder_is_one_line_and_nothing_is_written(convert, copied, tmp_path, capsys, damage, says):
    damage(copied)
    with pytest.raises(SystemExit) as end:
        convert("from_hf", copied, tmp_path / "made" / "ours")
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert re.search(says, said.err), said.err
    assert not (tmp_path / "made").exists()


def test_a_folder_of_ours_is_said_to_be_one_and_a_path_is_said_once(convert, llama, copied, tmp_path, capsys):
    convert("from_hf", llama, tmp_path / "ours")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    (copied / "config.json").write_text("{")
    capsys.readouterr()
    for source, says in (
        (tmp_path / "ours", f"DIR={tmp_path / 'ours'}: is a folder of this program; init_from="),
        (tmp_path / "run", f"DIR={tmp_path / 'run'}: is a folder of this program; init_from="),
        (copied, f"{copied / 'config.json'}: is not JSON"),
    ):
        with pytest.raises(SystemExit):
            convert("from_hf", source, tmp_path / "again")
        assert capsys.readouterr().err.startswith(f"error: {says}")


def test_what_is_there_is_left_alone(convert, llama, tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    for direction, source, key in (("from_hf", llama, "OUT"), ("to_hf", tmp_path / "good", "DIR")):
        if direction == "to_hf":
            convert("from_hf", llama, tmp_path / "good")
        with pytest.raises(SystemExit):
            convert(direction, source, tmp_path / "ours")
        assert capsys.readouterr().err == f"error: {key}={tmp_path / 'ours'}: exists; choose another folder, or move it away\n"
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine"]
    convert("from_hf", llama, tmp_path / "empty")
    assert (tmp_path / "empty" / WHOLE).is_file()


def test_a_write_that_fails_leaves_nothing(convert, llama, tmp_path, capsys, monkeypatch):
    def full(path: Path, values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(door, "copy_tokenizer", full)
    with pytest.raises(SystemExit):
        convert("from_hf", llama, tmp_path / "made" / "ours")
    assert capsys.readouterr().err == f"error: OUT={tmp_path / 'made/ours'}: the disk is full (No space left on device)\n"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_for_weights_leaves_nothing(convert, llama, tmp_path, capsys, monkeypatch):
    def full(content: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("train.weights.save_file", full)
    with pytest.raises(SystemExit):
        convert("from_hf", llama, tmp_path / "ours")
    assert "cannot be written (I/O error: No space left on device (os error 28)); nothing was kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "what to do must be given; accepted first word: from_hf, to_hf"),
        (["from_hd", "a", "b"], "from_hd: no such conversion, did you mean 'from_hf'?; accepted first word: from_hf, to_hf"),
        (["from_hf", "a"], "from_hf: takes two paths and got 1; python -m scripts.convert from_hf DIR OUT"),
        (["to_hf", "a", "b", "c"], "to_hf: takes two paths and got 3; python -m scripts.convert to_hf CKPT DIR"),
        (["from_hf", "/none/a", "/none/b"], "DIR=/none/a: is no folder here; hub names are not taken, download it first"),
        (["from_hf", "/dev/null", "/none/b"], "DIR=/dev/null: is no folder here; hub names are not taken, download it first"),
        (["from_hf", "/none/a", "/none/a/b"], "OUT=/none/a/b: lies in DIR=/none/a, which is left as it is; choose a folder outside"),
        (["from_hf", f"/{'a' * 300}", "/none/b"], f"/{'a' * 300}: File name too long"),
        (
            ["from_hf", "/none/it's {a}, \\b", "/none/b"],
            "DIR=/none/it's {a}, \\b: is no folder here; hub names are not taken, download it first",
        ),
        (["to_hf", "/none/a", "/none/b"], "/none/a: no such folder"),
        (["to_hf", "/none/a", "/none/b", "shard_bytes=0"], "shard_bytes=0: must be at least 1"),
        (["to_hf", "/none/a", "/none/b", "shard_size=1"], "shard_size: no such key, did you mean 'shard_bytes'?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(convert, capsys, arguments, says):
    with pytest.raises(SystemExit) as end:
        convert(*arguments)
    assert (end.value.code, capsys.readouterr().err) == (2, f"error: {says}\n")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(("content", "says"), [("{cut", "is not JSON"), ("[1]", "must hold an object, it holds a list")])
def test_a_damaged_file_of_the_tokenizer_is_named_and_nothing_is_kept(convert, llama, tmp_path, capsys, name, content, says):
    theirs = tmp_path / "theirs"
    shutil.copytree(llama, theirs)
    (theirs / name).write_text(content)
    with pytest.raises(SystemExit) as end:
        convert("from_hf", theirs, tmp_path / "ours")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"error: {theirs / name}: {says}") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == [theirs]


@pytest.mark.parametrize("arguments", [["--help"], ["from_hf", "--help"], ["to_hf", "-h"]])
def test_help_says_both_forms(convert, capsys, arguments):
    convert(*arguments)
    said = capsys.readouterr().out
    assert "from_hf DIR OUT" in said and "to_hf CKPT DIR" in said and "shard_bytes:" in said


def test_a_folder_of_theirs_is_not_exported_and_damage_in_ours_is_named(convert, llama, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert("to_hf", llama, tmp_path / "back")
    assert "is a Hugging Face folder; `python -m scripts.convert from_hf" in capsys.readouterr().err
    convert("from_hf", llama, tmp_path / "ours")
    values = json.loads((tmp_path / "ours/model.json").read_text())
    for change, says in (({"format": 2}, "format 2, this version reads format 1"), ({"rope": {"theta": 0}}, "rope.theta=0")):
        (tmp_path / "ours/model.json").write_text(json.dumps(values | change))
        with pytest.raises(SystemExit):
            convert("to_hf", tmp_path / "ours", tmp_path / "back")
        assert says in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


# --- MoBA in transformers, elsewhere ---------------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM

folder = sys.argv[1]
assert not any(name in sys.modules for name in ("model", "configs", "train"))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = torch.load(f"{folder}/../tokens.pt")
with torch.no_grad():
    logits = model(tokens[None]).logits[0]
new = model.generate(tokens[None, :60], attention_mask=torch.ones(1, 60, dtype=torch.int64), max_new_tokens=20, do_sample=False, eos_token_id=None)
model.save_pretrained(f"{folder}/../saved")
again = AutoModelForCausalLM.from_pretrained(f"{folder}/../saved", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(tokens[None]).logits[0], logits)
torch.save({"logits": logits, "new": new[0, 60:]}, f"{folder}/../found.pt")
print(type(model).__name__, model.config._attn_implementation)
"""


def test_a_moba_export_runs_where_this_repository_is_not(convert, llama, tmp_path):
    from model.generate import generate

    convert("from_hf", llama, tmp_path / "ours")
    values = json.loads((tmp_path / "ours/model.json").read_text())
    values["attention"]["rule"] = "last 1 full, rest moba(16, 2)"
    values["rope"] |= {"interpolation": 2.0, "nope": "last 1"}
    (tmp_path / "ours/model.json").write_text(json.dumps(values))
    convert("to_hf", tmp_path / "ours", tmp_path / "exported")
    tokens = pack([180])[0]
    torch.save(tokens, tmp_path / "tokens.pt")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    home = {"PYTHONPATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = ["env", *(f"{key}={value}" for key, value in home.items()), sys.executable, str(tmp_path / "elsewhere.py")]
    done = execute([*command, str(tmp_path / "exported")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["MobaLlamaForCausalLM", "moba"]

    described = read_model_file(tmp_path / "ours/model.json")
    ours = Transformer(described.model, described.attention.per_layer(2), described.rope).eval()
    content = tensors(tmp_path / "ours")
    assert content.keys() == parameter_shapes(described.model).keys()
    ours.load_state_dict(content | {"head.weight": content["embedding.weight"]})
    found = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        logits = ours(tokens, torch.arange(180), torch.tensor([0, 180], dtype=torch.int32))
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-4)
    assert found["new"].tolist() == generate(ours, tokens[:60], max_new_tokens=20).tolist()
    convert("from_hf", tmp_path / "exported", tmp_path / "ours_again")  # our own exports are read back with their rule
    again = read_model_file(tmp_path / "ours_again/model.json")
    assert again.attention.per_layer(2) == described.attention.per_layer(2)
    assert again.rope.nope_layers(2) == {1} and again.rope.interpolation == 2.0
