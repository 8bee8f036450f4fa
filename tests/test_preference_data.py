"""Rows of preference pairs, their token ids and batches, from outside."""

import copy
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="tokenizers and models are transformers'")

from fused_tdpo import LinearTDPOLoss, LMHead
from fused_tdpo.integrations.data import PreferenceCollator, check_pairs, tokenize_pairs
from tiny_models import CHAT_TEMPLATE, byte_tokenizer, chat_rows, id_rows, nearby, text_rows, tiny_model
from tolerances import assert_relative

ROWS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
]
X = -100


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small take less time than waking a thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


# ------------------------------------------------------------------------------------------------------------------- batches


def test_a_padded_batch():
    """Chosen sequences first; labels where the completions are."""
    batch = PreferenceCollator(pad_token_id=99)(ROWS)
    assert lists(batch) == {
        "input_ids": [[1, 2, 3, 4, 5], [7, 8, 9, 99, 99], [1, 2, 3, 6, 99], [7, 8, 10, 11, 99]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        "labels": [[X, X, X, 4, 5], [X, X, 9, X, X], [X, X, X, 6, X], [X, X, 10, 11, X]],
        "valid_rows": [2, 1, 1, 2],
    }
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "labels"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_with_weights(packed: bool):
    """A weight stands where its id does; answers without weigh 1."""
    rows = [ROWS[0] | {"chosen_weights": [0.5, 2], "rejected_weights": None}, ROWS[1] | {"rejected_weights": [-1, 0.25]}]
    weights = [[0, 0, 0, 0.5, 2], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, -1, 0.25, 0]]
    batch = PreferenceCollator(99, packed=packed)(rows)
    lengths = (5, 3, 4, 4)
    expected = [[w for row, n in zip(weights, lengths, strict=True) for w in row[:n]]] if packed else weights
    assert batch["token_weights"].tolist() == expected and batch["token_weights"].dtype == torch.float32
    cut = PreferenceCollator(99, 4, packed)(rows)
    assert cut["token_weights"].shape == cut["labels"].shape
    assert "token_weights" not in PreferenceCollator(99, packed=packed)(ROWS)


def test_a_packed_batch():
    """The same without padding: positions begin anew with each sequence."""
    batch = PreferenceCollator(pad_token_id=99, packed=True)(ROWS)
    assert lists(batch) == {
        "input_ids": [[1, 2, 3, 4, 5, 7, 8, 9, 1, 2, 3, 6, 7, 8, 10, 11]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]],
        "labels": [[X, X, X, 4, 5, X, X, 9, X, X, X, 6, X, X, 10, 11]],
        "cu_seqlens": [0, 5, 8, 12, 16],
        "valid_rows": [2, 1, 1, 2],
    }
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "position_ids", "labels"))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_batch_of_cut_sequences(packed: bool):
    """`max_length` keeps the start of prompt and completion; the rows that are given stay as they are."""
    rows = copy.deepcopy(ROWS)
    batch = PreferenceCollator(max_length=4, packed=packed)(rows)
    assert rows == ROWS
    sequences = [[1, 2, 3, 4], [7, 8, 9], [1, 2, 3, 6], [7, 8, 10, 11]]
    labels = [[X, X, X, 4], [X, X, 9], [X, X, X, 6], [X, X, 10, 11]]
    assert batch["valid_rows"] == [1, 1, 1, 2]
    if packed:
        assert lists(batch)["input_ids"] == [[*itertools.chain(*sequences)]]
        assert lists(batch)["labels"] == [[*itertools.chain(*labels)]]
        assert lists(batch)["cu_seqlens"] == [0, 4, 7, 11, 15]
    else:
        assert lists(batch)["input_ids"] == [sequence + [0] * (4 - len(sequence)) for sequence in sequences]
        assert lists(batch)["labels"] == [row + [X] * (4 - len(row)) for row in labels]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("max_length", [None, 9, 5])
def test_the_counts_are_those_of_the_labels(packed: bool, max_length: int | None):
    """Of the tokens that have one before them in their sequence: the first one is predicted by nothing, and does not count."""
    rows = [*id_rows(text_rows(7)), {"prompt_ids": [], "chosen_ids": [4, 5], "rejected_ids": [6]}]
    batch = PreferenceCollator(pad_token_id=256, max_length=max_length, packed=packed)(rows)
    if packed:
        starts = batch["cu_seqlens"].tolist()
        labels = [batch["labels"][0, start:end] for start, end in itertools.pairwise(starts)]
    else:
        labels = list(batch["labels"])
    assert list(batch["valid_rows"]) == [int((row[1:] != X).sum()) for row in labels]


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_packed_and_padded_are_one_loss(name: str):
    """From the models' hidden states, and with the counts that the collator knows."""
    model = tiny_model(name).eval()
    ref_model = nearby(model)
    head, ref_head = LMHead.from_model(model), LMHead.from_model(ref_model)
    rows = id_rows(text_rows(4))
    outputs = []
    for packed in (False, True):
        batch = PreferenceCollator(pad_token_id=256, packed=packed)(rows)
        keys = ("input_ids", "position_ids") if packed else ("input_ids", "attention_mask")
        inputs = {key: batch[key] for key in keys} | {"use_cache": False}
        with torch.no_grad():
            states = [m.base_model(**inputs).last_hidden_state for m in (model, ref_model)]
            labels, extra = batch["labels"], {"valid_rows": batch["valid_rows"]}
            if packed:
                states, labels = [hidden[0] for hidden in states], labels[0]
                extra["cu_seqlens"] = batch["cu_seqlens"]
            outputs.append(LinearTDPOLoss(beta=0.5)(states[0], head, states[1], ref_head, labels, **extra))
    padded, packed = outputs
    for what in ("losses", "chosen_logps", "rejected_logps", "chosen_kl", "rejected_kl"):
        assert_relative(what, getattr(packed, what), getattr(padded, what), 2e-5)


@pytest.mark.parametrize("bad", [0, -1, 4.5, "4"])
def test_a_max_length_that_is_none(bad: Any):
    with pytest.raises((TypeError, ValueError), match="max_length"):
        PreferenceCollator(max_length=bad)(ROWS)


def test_a_pad_token_that_is_missing():
    """As tokenizers have it that have none."""
    with pytest.raises((TypeError, ValueError), match="pad_token_id"):
        PreferenceCollator(pad_token_id=None)(ROWS)  # type: ignore[arg-type]


def test_batches_of_what_is_no_pair():
    with pytest.raises(ValueError, match=r"tokenize_pairs"):
        PreferenceCollator()([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(ValueError, match=r"(?s)\b1\b.*rejected_ids"):
        PreferenceCollator()([ROWS[0], {"prompt_ids": [1], "chosen_ids": [2]}])
    with pytest.raises(ValueError, match=r"(no|empty|at least one)"):
        PreferenceCollator()([])


# -------------------------------------------------------------------------------------------------------------------- checks

TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}
IDS = ROWS[0]


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        (IDS | {"chosen_ids": []}, "chosen_ids", "empty"),
        (IDS | {"rejected_ids": []}, "rejected_ids", "empty"),
        (IDS | {"chosen_ids": [1.0]}, "chosen_ids", "integers"),
        (IDS | {"chosen_ids": ["a"]}, "chosen_ids", "integers"),
        (IDS | {"chosen_ids": [True]}, "chosen_ids", "integers"),
        (IDS | {"chosen_ids": [[1, 2]]}, "chosen_ids", "integers"),
        (IDS | {"prompt_ids": [-1]}, "prompt_ids", "integers"),
        (IDS | {"prompt_ids": None}, "prompt_ids", "list.*NoneType"),
        (IDS | {"prompt_ids": "abc"}, "prompt_ids", "list.*str"),
        ({"prompt_ids": [1], "chosen_ids": [2]}, "rejected_ids", "missing"),
        (TEXT | {"chosen": ""}, "chosen", "empty"),
        (TEXT | {"chosen": None}, "chosen", "text"),
        (TEXT | {"chosen": 3}, "chosen", "text.*3"),
        (TEXT | {"chosen": []}, "chosen", "text"),
        (TEXT | {"chosen": [{"role": "assistant"}]}, "chosen", "content"),
        (TEXT | {"chosen": [{"role": "assistant", "content": "b"}]}, "", "text.*messages"),
        ({"prompt": "a", "chosen": "b"}, "rejected", "missing"),
        ({"question": "a"}, "prompt", "missing.*question"),
        ({}, "prompt", "missing"),
        (IDS | {"chosen_weights": [1.0]}, "chosen_weights", "2 numbers"),
        (IDS | {"chosen_weights": 1.0}, "chosen_weights", "2 numbers"),
        (IDS | {"rejected_weights": [float("nan")]}, "rejected_weights", "finite"),
        (IDS | {"rejected_weights": ["a"]}, "rejected_weights", "finite"),
        (TEXT | {"chosen_weights": [1.0]}, "chosen_weights", "of token ids"),
        (IDS | {"chosen_weight": [1.0]}, "chosen_weight", "unknown.*chosen_weights"),
        (IDS | {"chosen_kl_weights": [1.0]}, "chosen_kl_weights", "unknown"),
        ("abc", "", "mapping.*str"),
    ],
    ids=str,
)
def test_rows_that_are_no_pairs(row: Any, field: str, problem: str):
    """The table has the row's number, the field and what is wrong with it; and the text says what a row is."""
    good = IDS if isinstance(row, dict) and any(name.endswith("_ids") for name in row) else TEXT
    check_pairs([good] * 8)
    with pytest.raises(ValueError, match=rf"(?m)^\s*7\s+{field}\s+.*{problem}") as raised:
        check_pairs([good] * 7 + [row])
    assert all(name in str(raised.value) for name in ("prompt", "chosen", "rejected"))


def test_rows_that_may_be_taken():
    check_pairs([IDS | {"prompt_ids": []}, IDS | {"chosen_ids": (1, 2)}, IDS | {"other": object()}])
    check_pairs([TEXT | {"prompt": ""}, TEXT | {"id": 3}])
    check_pairs(chat_rows([TEXT]))
    check_pairs(row for row in [IDS, IDS])
    check_pairs([])


def test_the_table_is_short():
    """However many rows are wrong; and it says that there are more."""
    with pytest.raises(ValueError) as raised:
        check_pairs([IDS | {"chosen_ids": []}] * 1000)
    assert len(str(raised.value).splitlines()) < 20
    assert "more" in str(raised.value)


def test_text_among_ids():
    """A table of one kind: the other kind would not be noticed before it comes into a batch."""
    for rows in ([IDS, IDS, TEXT], [TEXT, TEXT, IDS]):
        with pytest.raises(ValueError, match=r"(?m)^\s*2\s"):
            check_pairs(rows)


def test_numbers_of_numpy_are_numbers():
    """A data set of arrays gives such."""
    numpy = pytest.importorskip("numpy")
    check_pairs([IDS | {"prompt_ids": list(numpy.array([1, 2]))}])


# ---------------------------------------------------------------------------------------------------------------- tokenizing


def test_text_of_bytes():
    """`<eos>` ends both completions, once."""
    rows = [{"prompt": "ab", "chosen": "cd", "rejected": "e"}, {"prompt": "f", "chosen": "g<eos>", "rejected": "h"}]
    tokenizer = byte_tokenizer()
    a = tokenizer("a")["input_ids"][0]
    assert tokenize_pairs(rows, tokenizer) == [
        {"prompt_ids": [a, a + 1], "chosen_ids": [a + 2, a + 3, 257], "rejected_ids": [a + 4, 257]},
        {"prompt_ids": [a + 5], "chosen_ids": [a + 6, 257], "rejected_ids": [a + 7, 257]},
    ]
    assert tokenize_pairs(text_rows(9), tokenizer) == id_rows(text_rows(9))


def test_conversations():
    """Through the chat template, which opens the answer at the end of the prompt."""
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    (row,) = tokenize_pairs(chat_rows([{"prompt": "ab", "chosen": "cd", "rejected": "e"}]), tokenizer)
    assert {name: tokenizer.decode(ids) for name, ids in row.items()} == {
        "prompt_ids": "<u>ab<a>",
        "chosen_ids": "cd<eos>",
        "rejected_ids": "e<eos>",
    }
    history = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    answers = {"chosen": [{"role": "assistant", "content": "d"}], "rejected": [{"role": "assistant", "content": "e"}]}
    (row,) = tokenize_pairs([{"prompt": history, **answers}], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<u>a<a>b<eos><u>c<a>"
    assert tokenizer.decode(row["chosen_ids"]) == "d<eos>"


def test_tokens_that_merge_across_the_boundary():
    """ "a" + "bc" is one token `ab` and `c`: the completion begins with the merged token, in both answers."""
    tokenizer = byte_tokenizer(merges=(("a", "b"),))
    ab = tokenizer("ab")["input_ids"]
    assert len(ab) == 1
    (row,) = tokenize_pairs([{"prompt": "xa", "chosen": "bc", "rejected": "dc"}], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "x"
    assert row["chosen_ids"][0] == ab[0]
    assert tokenizer.decode(row["chosen_ids"]) == "abc<eos>"
    assert tokenizer.decode(row["rejected_ids"]) == "adc<eos>"


@pytest.mark.parametrize("conversations", [False, True], ids=["text", "chat"])
def test_ids_are_those_of_trl(conversations: bool, tmp_path: Any):
    """For a tokenizer that merges a lot, and a length that drops some rows."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    draw = random.Random(0)
    letters = "abcdefgh"
    merges = tuple((a, b) for a in letters for b in letters if draw.random() < 0.4)
    tokenizer = byte_tokenizer(merges, CHAT_TEMPLATE)
    rows: Any = text_rows(60, seed=5)
    if conversations:
        rows = chat_rows(rows)
    max_length = 9 if conversations else 4
    config = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    args = trl.DPOConfig(output_dir=str(tmp_path), max_length=max_length, **config)
    model = tiny_model(vocab_size=400)
    trainer = trl.DPOTrainer(
        model, copy.deepcopy(model), args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    expected = trainer.train_dataset.select_columns(columns).to_list()
    assert 0 < len(expected) < len(rows)
    assert tokenize_pairs(rows, tokenizer, max_length) == expected
    assert tokenize_pairs(datasets.Dataset.from_list(rows), tokenizer, max_length) == expected


def test_prompts_that_fill_the_length(caplog: pytest.LogCaptureFixture):
    """Nothing would be left to learn from: such rows are dropped, which is said; none left is an error."""
    rows = [{"prompt": "abcd", "chosen": "e", "rejected": "f"}, {"prompt": "abc", "chosen": "e", "rejected": "f"}]
    (row,) = tokenize_pairs(rows, byte_tokenizer(), max_length=4)
    assert len(row["prompt_ids"]) == 3
    assert "1 of 2" in caplog.text
    with pytest.raises(ValueError, match="max_length=3"):
        tokenize_pairs(rows, byte_tokenizer(), max_length=3)


def test_rows_that_cannot_be_tokenized():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"(?m)^\s*1\s+chosen\s"):
        tokenize_pairs([TEXT, TEXT | {"chosen": ""}], tokenizer)
    with pytest.raises(ValueError, match=r"chat_template"):
        tokenize_pairs(chat_rows([TEXT]), tokenizer)
    with pytest.raises(ValueError, match=r"(?s)(ids|token)"):
        tokenize_pairs([IDS], tokenizer)
    with pytest.raises(ValueError, match=r"(no|empty)(?!.*max_length=None)"):
        tokenize_pairs([], tokenizer)


def test_a_tokenizer_without_an_end():
    """Where there is no `<eos>`, none is added."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    (row,) = tokenize_pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer)
    assert [tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == ["a", "b", "c"]
