"""Directions of concepts: layers found and read, directions against closed forms and differences,
pushes against networks that are pushed by hand, hooks that are gone whatever happens, bad input."""
import importlib.util
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from agop_book.activations import context_of, find_layers, layer_names, read_layers, token_rows
from agop_book.rfm import RFMRegressor
from agop_book.steering import METHODS, Concept, directions, learn_concept, monitor
from agop_book.steering import rfm_direction, state_direction, steer

text = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed")


class Block(nn.Module):
    def __init__(self, d, pair):
        super().__init__()
        self.linear, self.pair = nn.Linear(d, d), pair

    def forward(self, h):
        h = h + torch.tanh(self.linear(h))
        return (h, "beside") if self.pair else h


class Net(nn.Module):
    "A language model of our own: no attention, so that a text can be computed by hand."

    def __init__(self, pair=False, vocab=11, d=5):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d, pair) for _ in range(3))
        self.head = nn.Linear(d, vocab)

    def forward(self, ids, pushes=None):
        h = self.embedding(ids)
        for i, block in enumerate(self.blocks):
            h = block(h)
            h = h[0] if isinstance(h, tuple) else h
            if pushes:
                h = h + pushes[i]
        return self.head(h)


@pytest.fixture(params=[False, True], ids=["tensor", "tuple"])
def net(request):
    torch.manual_seed(0)
    return Net(request.param).double().eval()


TEXTS = [[1, 2, 3], [4, 5], [6], [7, 8, 9], [1, 5], [2, 2, 2, 2], [3, 9], [10]]
LABELS = [0, 1, 1, 0, 1, 0, 1, 0]


def learned(net, **options):
    return directions(net, TEXTS, LABELS, method="difference", **options)


def clean(net):
    return not any(module._forward_hooks for module in net.modules())


def by_hand(net, concept, strength):
    return [strength * concept.lengths[i] * concept.vectors[i].to(net.head.weight)
            for i in (1, 2, 3)]


# --- layers and states


def test_layers_are_found_by_number_and_by_name(net):
    assert layer_names(net) == ["blocks.0", "blocks.1", "blocks.2"]
    found = find_layers(net, [2, "blocks.0", "head"])
    assert list(found.values()) == [net.blocks[1], net.blocks[0], net.head]
    assert list(find_layers(net)) == [1, 2, 3] and list(find_layers(net, 3)) == [3]


@pytest.mark.parametrize("layer, words", [
    (4, "did you mean 3"), (0, "did you mean 1"), (-1, "did you mean 1"), (True, "no such layer"),
    ("blocks.7", "'blocks.2' or"), ("block.1", "blocks.1"), ("", "numbers 1 to 3"),
    (1.5, "numbers 1 to 3"), (None, "numbers 1 to 3")])
def test_a_layer_that_does_not_exist(net, layer, words):
    with pytest.raises(ValueError, match="layers=") as error:
        find_layers(net, [layer])
    assert words in str(error.value) and "'blocks.0' to 'blocks.2'" in str(error.value)
    with pytest.raises(ValueError, match="layers is empty"):
        find_layers(net, [])


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.ReLU()), None, "gpt2", 3])
def test_a_model_without_hidden_states(model):
    for call in (lambda: layer_names(model), lambda: directions(model, TEXTS, LABELS)):
        with pytest.raises(ValueError, match="model: .* has no hidden states"):
            call()


@pytest.mark.parametrize("at", ["mean", "last"])
def test_states_are_those_of_each_text_alone(net, at):
    found = read_layers(net, TEXTS, at=at, batch_size=2)
    for i, ids in enumerate(TEXTS):
        h = net.embedding(torch.tensor(ids))
        for layer, block in enumerate(net.blocks, 1):
            h = h + torch.tanh(block.linear(h))
            want = h.mean(0) if at == "mean" else h[-1]
            assert torch.allclose(found[layer][i], want)
    assert clean(net)


def test_hooks_are_gone_when_reading_fails(net):
    with pytest.raises(IndexError):
        read_layers(net, [[99]])
    with pytest.raises(ValueError, match="'embedding.*' hands on no|layers='tell'"):
        net.tell = nn.Identity()
        read_layers(net, [[1]], "tell")
    assert clean(net)


class Letters:
    def encode(self, words):
        return [ord(c) - 96 for c in words]


@pytest.mark.parametrize("texts, error, words", [
    ("abc", TypeError, "pass a list"), ([], ValueError, "texts is empty"),
    (["a", ""], ValueError, r"texts\[1\]='' has no token"), ([[1], []], ValueError, r"texts\[1\]"),
    ([[1], [2] * 9], ValueError, r"texts\[1\] has 9 tokens, more than the 8"),
    ([[0.5]], TypeError, r"texts\[0\]"), ([[[1]]], TypeError, r"texts\[0\]"),
    ([[True]], TypeError, r"texts\[0\]")])
def test_texts_that_cannot_be_read(texts, error, words):
    with pytest.raises(error, match=words):
        token_rows(texts, Letters(), context=8)


def test_strings_need_a_tokenizer(net):
    rows = token_rows(["abc", [4]], Letters())
    assert [row.tolist() for row in rows] == [[1, 2, 3], [4]]
    with pytest.raises(ValueError, match="tokens=None"):
        token_rows(["abc"])
    for options, words in (({"at": "first"}, "at='first'"), ({"batch_size": 0}, "batch_size=0")):
        with pytest.raises(ValueError, match=words):
            read_layers(net, [[1]], **options)


@text
def test_models_of_transformers():
    import transformers as tf

    tf.set_seed(0)
    small = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=8, max_position_embeddings=6)
    models = {
        "transformer.h": tf.GPT2LMHeadModel(tf.GPT2Config(
            vocab_size=20, n_positions=6, n_layer=2, n_head=2, n_embd=8)),
        "model.layers": tf.LlamaForCausalLM(tf.LlamaConfig(**small)),
        "encoder.layer": tf.BertModel(tf.BertConfig(**small)),
    }
    for home, model in models.items():
        assert layer_names(model.eval()) == [f"{home}.0", f"{home}.1"] and context_of(model) == 6
        ids = torch.tensor([[1, 2, 3, 4]])
        want = model(ids, output_hidden_states=True).hidden_states[1]
        assert torch.allclose(read_layers(model, ids)[1][0], want[0].mean(0), atol=1e-6)
        before = model(ids)[0]
        concept = learn_concept(read_layers(model, TEXTS), np.array(LABELS) > 0, model=model)
        with steer(concept, 0.5):
            assert not torch.allclose(model(ids)[0], before)
        assert torch.equal(model(ids)[0], before)
        with pytest.raises(ValueError, match=r"texts\[0\] has 7 tokens, more than the 6"):
            read_layers(model, [[1] * 7])


# --- directions


def rows(n=300, d=6, seed=0):
    rng = np.random.default_rng(seed)
    X = torch.from_numpy(rng.normal(size=(n, d)) @ np.diag([3, 2, 1, 1, 0.5, 0.2]))
    return X, X[:, 2].numpy() > 0


def test_closed_forms():
    X, y = rows()
    v = X[y].mean(0) - X[~y].mean(0)
    assert torch.allclose(state_direction(X, y, "difference"), v / v.norm())
    leading = state_direction(X, y, "pca")
    values, V = torch.linalg.eigh(torch.cov(X.T))
    assert abs(float(leading @ V[:, -1])) > 1 - 1e-9
    w = LogisticRegression(C=1e3, max_iter=2000).fit(X, y).coef_[0]
    assert float(state_direction(X, y, "logistic") @ torch.from_numpy(w / np.linalg.norm(w))) > 0.98


@pytest.mark.parametrize("method", METHODS)
def test_what_all_directions_share(method):
    X, y = rows()
    v = state_direction(X, y, method)
    assert v.dtype == torch.float64 and abs(float(v.norm()) - 1) < 1e-12
    along = X @ v
    assert along[y].mean() > along[~y].mean()
    assert torch.equal(v, state_direction(X, y, method))
    assert torch.allclose(state_direction(X + 5, y, method), v, atol=1e-6)
    if "rfm" in method or method == "logistic":
        assert float(v[2]) > 0.9


@pytest.mark.parametrize("whiten", [False, True])
def test_the_direction_is_that_of_the_gradients_by_differences(whiten):
    "The same machine, asked again at rows a little to the side of its own."
    X, y = rows(80)
    X = X - X.mean(0)
    targets = np.where(y, 1.0, -1.0)
    found = rfm_direction(X, targets, whiten)
    C = X.T @ X / len(X)
    values, V = torch.linalg.eigh(C + 0.1 * C.trace() / 6 * torch.eye(6))
    A = torch.eye(6).double() / C.trace()**0.5
    if whiten:
        A = V @ torch.diag(values**-0.5) @ V.T / 6**0.5
    machine = RFMRegressor(
        kernel="laplace", bandwidth=[1.0, 3.0, 10.0], reg=[1e-3, 1e-2, 0.1], metric="full",
        center=False, n_iter=3, validation_fraction=0.25, refit=True, random_state=0)
    Z = (X @ A).numpy()
    machine.fit(Z, targets)
    step = 1e-5

    def moved(j):
        aside = step * np.eye(6)[j]
        return (machine.predict(Z + aside) - machine.predict(Z - aside)) / (2 * step)

    J = np.stack([moved(j) for j in range(6)], 1)
    J = J @ np.linalg.inv(A.numpy()).T                 # gradients in the coordinates of X ...
    G = A.numpy() @ (J.T @ J) @ A.numpy()              # ... and back: A^T grad
    w = A.numpy() @ np.linalg.eigh(G)[1][:, -1]
    assert abs(float(found @ torch.from_numpy(w))) / float(found.norm()) > 0.99 * np.linalg.norm(w)


def test_a_concept_that_no_linear_method_sees():
    X = torch.from_numpy(np.random.default_rng(1).normal(size=(500, 8)))
    y = X[:, 3].abs().numpy() > 0.7
    for method, sees in {"rfm": True, "whitened rfm": True, "difference": False,
                         "logistic": False, "pca": False, "random": False}.items():
        assert (abs(float(state_direction(X, y, method)[3])) > 0.9) == sees


def test_bad_states_and_methods():
    X, y = rows()
    with pytest.raises(ValueError, match="method='ridge': choose one of 'rfm'"):
        state_direction(X, y, "ridge")
    for method in METHODS:
        with pytest.raises(ValueError, match="says the same of all"):
            state_direction(torch.ones(9, 3), np.arange(9) > 4, method)


@pytest.mark.parametrize("labels, words", [
    ([1] * 8, "labels holds 1 different values"), ([0, 1], r"labels has shape \(2,\) for 8 texts"),
    ([0, 1, 2] + [1] * 5, "labels holds 3"), ([1, 1, 1] + [0] * 5, "at least 4"),
    ([[0, 1]] * 8, "labels has shape"), ([np.nan] + [1] * 7, "labels"), ([], "labels has shape")])
def test_labels_that_make_no_concept(net, labels, words):
    with pytest.raises(ValueError, match=words):
        directions(net, TEXTS, labels)
    assert clean(net)


def test_what_a_user_hands_in(net):
    "Labels of any two values, texts as an iterator, layers by name, strings."
    plain = learned(net)
    named = directions(net, iter(TEXTS), ["yes" if y else "no" for y in LABELS],
                       layers=["blocks.1"], method="difference")
    assert torch.equal(named.vectors["blocks.1"], plain.vectors[2])
    turned = directions(net, TEXTS, pd.Series(LABELS) == 0, method="difference")
    assert torch.allclose(turned.vectors[1], -plain.vectors[1])
    words = ["".join(chr(96 + i) for i in ids) for ids in TEXTS]
    spoken = directions(net, words, LABELS, tokens=Letters(), method="difference")
    assert torch.equal(spoken.vectors[3], plain.vectors[3])
    assert np.allclose(monitor(spoken, ["abc"]), monitor(plain, [[1, 2, 3]]))
    with pytest.raises(TypeError, match="texts is one string"):
        directions(net, "abc", LABELS)
    with pytest.raises(ValueError, match="did you mean 3"):
        directions(net, TEXTS, LABELS, layers=7)


# --- reading and writing


def test_scores_are_deviations_from_the_training_texts(net):
    concept = learned(net)
    scores = monitor(concept, TEXTS)
    assert list(scores) == [1, 2, 3] and np.allclose(scores.mean(), 0)
    assert np.allclose(scores.std(), 1)
    first = read_layers(net, TEXTS, 1)[1]
    want = (first - first.mean(0)) @ concept.vectors[1]
    assert np.allclose(scores[1], want / want.std())


def test_a_push_is_what_a_push_by_hand_does(net):
    concept, ids = learned(net), torch.tensor([[1, 2, 3]])
    with steer(concept, 0.7) as model:
        assert model is net
        pushed = net(ids)
    assert torch.allclose(pushed, net(ids, by_hand(net, concept, 0.7)))
    with steer(concept, 0.0):
        assert torch.equal(net(ids), net(ids))
    with steer(concept, 0.7, layers=[2]):
        one = net(ids)
    pushes = by_hand(net, concept, 0.7)
    assert torch.allclose(one, net(ids, [0 * pushes[0], pushes[1], 0 * pushes[2]]))
    assert clean(net)


def test_nests_add_up_and_come_off_in_order(net):
    first, ids = learned(net), torch.tensor([[4, 5]])
    second = directions(net, TEXTS, LABELS, method="random", random_state=3)
    before = net(ids)
    sums = [a + b for a, b in zip(by_hand(net, first, 0.3), by_hand(net, second, -0.5))]
    with steer(first, 0.3):
        outer = net(ids)
        with steer(second, -0.5):
            assert torch.allclose(net(ids), net(ids.clone()))
            both = net(ids)
        assert torch.equal(net(ids), outer)
    assert torch.allclose(both, net(ids, sums)) and torch.equal(net(ids), before)
    with steer(first, 0.3), steer(first, -0.3):
        assert torch.allclose(net(ids), before)


def test_hooks_are_gone_whatever_happens(net):
    concept, ids = learned(net), torch.tensor([[1]])
    with pytest.raises(KeyboardInterrupt), steer(concept, 1.0):
        with steer(concept, 2.0):
            raise KeyboardInterrupt
    assert clean(net)
    with pytest.raises(RuntimeError), steer(concept, 1.0):
        outer = net(ids)
        with pytest.raises(ZeroDivisionError), steer(concept, 2.0):
            raise ZeroDivisionError
        assert torch.equal(net(ids), outer)
        raise RuntimeError
    assert clean(net)
    writer = steer(concept, 1.0)
    writer.__enter__()
    writer.__exit__(None, None, None)
    assert clean(net)


@pytest.mark.parametrize("strength", ["1", None, np.nan, np.inf, True, [1.0]])
def test_a_strength_that_is_none(net, strength):
    with pytest.raises(ValueError, match="strength="), steer(learned(net), strength):
        pass
    assert clean(net)


def test_layers_without_a_direction_or_without_states(net):
    concept = directions(net, TEXTS, LABELS, layers=[1, 2], method="difference")
    with pytest.raises(ValueError, match="no direction in 3, only in 1, 2"):
        with steer(concept, 1.0, layers=[1, 3]):
            pass
    odd = Concept({"head": torch.ones(2)}, {}, {}, {"head": 1.0}, model=Odd())
    with pytest.raises(ValueError, match="Words hands on no hidden states"), steer(odd, 1.0):
        odd.model(torch.tensor([[1]]))
    assert clean(odd.model) and clean(net)


class Words(nn.Module):
    def forward(self, h):
        return "words"


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([nn.Identity()]), Words()

    def forward(self, ids):
        return self.head(ids)


@pytest.mark.parametrize("concept", ["animals", None, Concept({}, {}, {}, {})])
def test_what_is_no_concept_of_a_model(concept):
    with pytest.raises(TypeError, match="concept must be what directions"):
        monitor(concept, TEXTS)
    with pytest.raises(TypeError, match="concept must be what directions"), steer(concept, 1.0):
        pass


def test_a_model_in_half_precision_is_pushed_in_its_own(net):
    concept = learned(net)
    net.bfloat16()
    with steer(concept, 0.5):
        assert net(torch.tensor([[1, 2]])).dtype == torch.bfloat16


def test_learning_warns_of_nothing():
    X, y = rows(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            state_direction(X, y, method)


# --- the book's concepts and figures


@text
def test_concepts_that_a_program_can_check():
    from agop_book.book.concepts import CONCEPTS, END, balanced_pieces, carries, concept_labels

    assert carries("food", ["two cookies", "cookiecutter"]).tolist() == [True, False]
    assert carries("names", ["Tim ran.", "Time ran."]).tolist() == [True, False]
    assert carries("present tense", ["I don't know.", "He went."]).tolist() == [True, False]
    table = pd.DataFrame({"text": ["a dog", "a tree"] * 8, "next": [END] * 4 + ["more"] * 12})
    assert concept_labels("ending soon", table).sum() == 4
    assert concept_labels("animals", table).sum() == 8
    some, y = balanced_pieces("ending soon", table, 100, 0)
    assert len(some) == 8 and y.sum() == 4 and (some.index < 4).sum() == 4
    assert len(CONCEPTS) == 6


@text
def test_made_stories_hold_the_concepts():
    from agop_book.book.concepts import CONCEPTS, carries, made_story

    stories = [made_story(np.random.default_rng(seed)) for seed in range(50)]
    rates = {name: carries(name, stories).mean() for name in CONCEPTS if name != "ending soon"}
    assert all(0.2 < rate < 1 for rate in rates.values()), rates


@text
def test_what_a_price_buys():
    from agop_book.book.steering_figures import bought
    from agop_book.book.steering_study import variety

    assert bought([0.2, 0.4, 0.9], [1.0, 1.1, 1.21], 1.1) == pytest.approx(0.2)
    middle = bought([0.0, 1.0], [1.0, 4.0], 2.0)
    assert middle == pytest.approx(0.5)                      # halfway in logarithms
    assert bought([0.2, 0.5], [1.0, 1.05], 1.2) == pytest.approx(0.3)
    assert variety(["a b c d"]) == 100 and variety(["a a a a"]) == 25
