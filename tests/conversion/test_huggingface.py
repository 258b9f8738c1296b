"""What `transformers` finds beside the weights: configs and tokenizers."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import sentencepiece as spm
from checkpoints import CONFIGS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.messages import encode_messages, read_messages
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.tokenizer import Tokenizer, apply_it_formatter
from recurrentgemma.common.vocabulary import SENTENCEPIECE
from recurrentgemma_conversion import Format, convert
from recurrentgemma_conversion.convert import WRITERS
from recurrentgemma_conversion.names.griffin import as_published, from_fields, to_fields
from recurrentgemma_conversion.opening import load_tokenizer
from recurrentgemma_conversion.readers.huggingface import SPECIAL
from recurrentgemma_conversion.readers.huggingface_tokenizer import write_tokenizer_files

# Google's config.json of the 2B model has these, at these values.
PUBLISHED = {
    "architectures": ["RecurrentGemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_window_size": 2048,
    "block_types": ["recurrent", "recurrent", "attention"],
    "bos_token_id": 2,
    "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True,
    "eos_token_id": 1,
    "final_w_init_variance_scale": 2 / 26,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560,
    "intermediate_size": 15360,
    "logits_soft_cap": 30.0,
    "lru_width": 2560,
    "model_type": "recurrent_gemma",
    "num_attention_heads": 10,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
    "w_init_variance_scale": 0.01,
}


def test_the_config_of_huggingface_says_what_the_published_one_says(tmp_path: Path) -> None:
    config = GriffinConfig.from_preset("RECURRENT_GEMMA_2B_V1")
    same = to_fields(config, "bfloat16") | SPECIAL
    assert same["attention_window_size"] == 2049  # transformers counts the query's own key
    fields = as_published(same)
    assert {name: fields.get(name) for name in PUBLISHED} == PUBLISHED
    assert from_fields(tmp_path, same) == from_fields(tmp_path, fields) == config
    assert from_fields(tmp_path, PUBLISHED) == config
    blocks = to_fields(CONFIGS["griffin"], "float32")["block_types"]
    assert blocks == ["recurrent", "recurrent", "attention"]


TEXTS = [
    "",
    "It is a truth universally acknowledged, that a single man",
    " leading, trailing and  doubled   spaces ",
    "lines\n\n\nand\ttabs\n",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "日本語, émigré and 🎉",
]


TURNS = ("<start_of_turn>", "<end_of_turn>")


def bpe_tokenizer(path: Path, symbols: tuple[str, ...] = (*TURNS, "\n", "\n\n")) -> Path:
    """A sentencepiece model of the kind that Gemma has."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if text] * 50),
        model_prefix=str(path),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    return path.with_suffix(".model")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory):
    """Our tokenizer of a kind and the one that transformers makes of what was written."""
    transformers = pytest.importorskip("transformers")

    @functools.cache
    def make(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        path = BUNDLED / SENTENCEPIECE if kind == "unigram" else bpe_tokenizer(folder / "tokenizer")
        ours = Tokenizer(path)
        (folder / "out").mkdir()
        write_tokenizer_files(folder / "out", ours)
        return ours, transformers.AutoTokenizer.from_pretrained(folder / "out")

    return make


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@given(text=st.one_of(st.text(), st.text("abet \n<>é🎉▁", max_size=40)))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokenizers_of_transformers_give_the_same_ids(tokenizers, kind: str, text: str) -> None:
    ours, theirs = tokenizers(kind)
    for part in (*TEXTS, text):
        special = ("<pad>", "<eos>", "<bos>", "<unk>", "\0")
        if not any(piece in part for piece in special):
            ids = theirs(part)["input_ids"]
            assert ids == ours.encode(part), part
            if "_turn>" not in part:  # theirs leaves out both marks of a turn, ours its end
                assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_special_tokens_and_decoding(tokenizers) -> None:
    for kind in ("unigram", "bpe"):
        ours, theirs = tokenizers(kind)
        ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
        assert ids == (ours.bos_id, ours.eos_id, ours.pad_id)
        assert len(theirs) == ours.size
        turn = [*ours.encode("Hi"), ours.end_of_turn_id]
        assert theirs.decode(turn, skip_special_tokens=True) == "Hi"
        padded = theirs(["Hi", "Hi there, you"], padding=True)["input_ids"]
        assert padded[0][0] == ours.pad_id  # on the left, as generation wants it


def messages(*texts: str, answer: str = "assistant") -> list[dict[str, str]]:
    """A conversation in which the user speaks first."""
    return [{"role": answer if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


CONVERSATIONS = [
    ("Hi",),
    (" spaces around \n\n",),
    ("Who are you?", "I am.\n", "Sure?\nReally?"),
    ("日本語", "", "{{ 1 + 1 }} {% raw %}", "é", "end"),
]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("texts", CONVERSATIONS)
def test_the_chat_template_is_ours(tokenizers, kind: str, texts: tuple[str, ...]) -> None:
    pytest.importorskip("jinja2")
    ours, theirs = tokenizers(kind)
    expected = ""
    for said, answered in itertools.zip_longest(texts[::2], texts[1::2]):
        expected += apply_it_formatter(said.strip())
        expected += "" if answered is None else f"{answered.strip()}<end_of_turn>\n"
    for answer in ("assistant", "model"):
        said = messages(*texts, answer=answer)
        text = theirs.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        assert text == theirs.bos_token + expected
        ids = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert ids == ours.encode(expected)
        text = theirs.apply_chat_template(said, tokenize=False)
        assert text == theirs.bos_token + expected.removesuffix("<start_of_turn>model\n")


@pytest.mark.parametrize("system", ["", " Be brief.\n"])
@pytest.mark.parametrize("texts", CONVERSATIONS)
def test_messages_are_those_of_the_template(tokenizers, texts, system: str) -> None:
    """White space around words goes, the system text stays as it is, and BOS comes once."""
    pytest.importorskip("jinja2")
    ours, theirs = tokenizers("bpe")
    said = messages(*texts)
    if system:
        said.insert(0, {"role": "system", "content": system})
    turns = encode_messages(read_messages(said, answered=len(texts) % 2 == 0), ours)
    ids = [token for tokens, _ in turns for token in tokens]
    assert ids == theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert ids.count(ours.bos_id) == 1
    words = texts[0].strip()
    opening = f"{system}\n\n{words}" if system else words
    assert ours.vocab.DecodeIds(ids).startswith(f"<start_of_turn>user\n{opening}<end_of_turn>\n")


@pytest.mark.parametrize(
    "roles", [("system", "system"), ("user", "user"), ("assistant",), ("user", "tool")]
)
def test_the_chat_template_refuses_what_ours_has_no_form_for(
    tokenizers, roles: tuple[str, ...]
) -> None:
    jinja2 = pytest.importorskip("jinja2")
    said = [{"role": role, "content": "Hi"} for role in roles]
    with pytest.raises(jinja2.TemplateError, match="user and assistant must alternate"):
        tokenizers("unigram")[1].apply_chat_template(said)


def test_a_model_that_does_not_chat_has_no_template(tmp_path: Path) -> None:
    path = bpe_tokenizer(tmp_path / "plain", symbols=("\n",))
    (tmp_path / "out").mkdir()
    write_tokenizer_files(tmp_path / "out", Tokenizer(path))
    fields = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert "chat_template" not in fields


def test_a_template_of_the_source_stays(tmp_path: Path, make) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    source = make("source", Format.HUGGINGFACE)
    (source / "chat_template.jinja").write_text("theirs")
    convert(source, tmp_path / "out", Format.HUGGINGFACE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(messages("Hi"), tokenize=False) == "theirs"


def test_a_converted_folder_is_whole_for_transformers(tmp_path: Path, make) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch.nn")
    import torch

    source = make("source", Format.RECURRENTGEMMA)
    convert(source, tmp_path / "out", Format.HUGGINGFACE)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, end_of_turn]
    tokens = tokenizer("In the beginning", return_tensors="pt")
    length = tokens["input_ids"].shape[1]
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] == length + 3
    # A model that says nothing else ends its turn at once.
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.nn.functional.one_hot(
        torch.tensor(end_of_turn), len(tokenizer)
    ).float()
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] == length + 1
    assert json.loads((source / "config.json").read_text())["vocab_size"] == len(tokenizer)


def test_files_of_another_tokenizer_are_not_kept(tmp_path: Path, make) -> None:
    source = make("source", Format.HUGGINGFACE)
    (source / "tokenizer_config.json").write_text('{"mine": true}')
    convert(source, tmp_path / "kept", Format.HUGGINGFACE)
    convert(source, tmp_path / "new", Format.HUGGINGFACE, tokenizer=BUNDLED / SENTENCEPIECE)
    for name, mine in (("kept", True), ("new", False)):
        fields = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert ("mine" in fields) == mine


@pytest.fixture
def without_pieces(make) -> Path:
    """A folder with `tokenizer.json` alone and ids of its own."""
    source = make("source", Format.HUGGINGFACE)
    (source / SENTENCEPIECE).unlink()
    (source / "generation_config.json").unlink()
    fields = json.loads((source / "config.json").read_text()) | OWN
    (source / "config.json").write_text(json.dumps(fields))
    return source


OWN = {"bos_token_id": 8, "eos_token_id": [7, 107], "pad_token_id": None}


def special(folder: Path, name: str) -> dict[str, int]:
    fields = json.loads((folder / name).read_text())
    return {key: fields[key] for key in OWN}


def test_a_copy_keeps_the_special_ids_with_the_tokenizer(tmp_path: Path, without_pieces) -> None:
    out, replaced = tmp_path / "out", tmp_path / "replaced"
    convert(without_pieces, out, Format.HUGGINGFACE)
    convert(without_pieces, replaced, Format.HUGGINGFACE, tokenizer=BUNDLED / SENTENCEPIECE)
    ours = Tokenizer(BUNDLED / SENTENCEPIECE)
    ids = {"bos_token_id": ours.bos_id, "eos_token_id": ours.eos_id, "pad_token_id": ours.pad_id}
    ends = {"eos_token_id": [ours.eos_id, ours.end_of_turn_id]}
    for name, expected in (("config.json", ids), ("generation_config.json", ids | ends)):
        assert special(out, name) == OWN
        assert special(replaced, name) == expected
    name = "tokenizer.json"
    assert (out / name).read_bytes() == (without_pieces / name).read_bytes()


@pytest.mark.parametrize("to", [*WRITERS])
def test_a_tokenizer_json_goes_along(tmp_path: Path, without_pieces, to: Format) -> None:
    """A folder saved by `transformers` 5 has no sentencepiece model."""
    convert(without_pieces, tmp_path / "out", to)
    text = "In the beginning <end_of_turn>, 日本"
    tokenizers = [load_tokenizer(path) for path in (tmp_path / "out", without_pieces, BUNDLED)]
    assert len({tuple(tokenizer.encode(text)) for tokenizer in tokenizers}) == 1
    again = tmp_path / "out" / "tokenizer.json"
    assert again.read_bytes() == (without_pieces / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_changes_text_is_left_to_sentencepiece(tmp_path: Path) -> None:
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[1:] * 50), model_prefix=str(tmp_path / "m"), vocab_size=60,
        model_type="bpe", byte_fallback=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    write_tokenizer_files(tmp_path / "out", Tokenizer(tmp_path / "m.model"))
    assert not list((tmp_path / "out").iterdir())
