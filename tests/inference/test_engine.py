"""The cache changes no logits; batches, meshes and shared prompts change no text; greedy is transformers'."""

import functools
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from steerjax.bundle import Bundle, open_bundle
from steerjax.chat.templates import CHATML, EXTRA_ID
from steerjax.chat.tokenizer import load_tokenizer
from steerjax.data.conversation import Conversation, Turn
from steerjax.hf.description import Description
from steerjax.inference.engine import Engine, Request, Rows, arrange, bucket, by_length, common_length
from steerjax.inference.steering import Sampling
from steerjax.models.attention import Cache
from steerjax.models.config import LlamaConfig, RopeScaling
from steerjax.models.llama import CausalLM, Compute, unstacked
from steerjax.parallel.mesh import MeshConfig, make_mesh
from steerjax.schema import HELPSTEER

TINY = LlamaConfig(
    vocab_size=4096, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
    initializer_range=0.3, max_position_embeddings=256,
)  # fmt: skip
TOKENIZER = load_tokenizer("embedded")


def tiny(**changes):
    """A random model and its parameters."""
    model = CausalLM(replace(TINY, **changes), Compute(chunk=4))
    one = jnp.ones((1, 4), jnp.int32)
    return model, meta.unbox(model.init(jax.random.key(0), one, one, one)["params"])


def engine(sampling, model_and_params=None, template=EXTRA_ID, mesh=None, **options):
    model, params = model_and_params or tiny()
    about = Description(Path(), "chat", model.config, TOKENIZER, template, HELPSTEER, None, "last", None, {})
    bundle = Bundle(about, model, params, mesh or make_mesh(MeshConfig(), jax.devices()[:1]))
    return Engine(bundle, HELPSTEER, sampling, **options)


def extend(model, params, *arguments):
    return model.apply({"params": params}, *arguments, method="extend")


def empty_cache(model, rows):
    """Of the layers in one stack, without a slot."""
    c = model.config
    none = jnp.zeros((c.num_layers, rows, 0, c.num_kv_heads, c.head_dim))
    return Cache(none, none)


def generate(decoder, requests):
    """Answers [request][setting][sample]."""
    return [
        [answers[n : n + request.samples] for n in range(0, len(answers), request.samples)]
        for request, answers in zip(requests, decoder.run(requests), strict=True)
    ]


def prompts(count, seed=0, longest=32):  # their prefixes fill one bucket, so that one shape is compiled
    random = np.random.default_rng(seed)
    return [random.integers(10, 4096, random.integers(1, longest)).astype(np.int32) for _ in range(count)]


def texts(answers):
    return [answer.ids for request in answers for setting in request for answer in setting]


@pytest.mark.parametrize("case", [{}, {"tie_word_embeddings": False, "num_kv_heads": 1, "rope_theta": 5e5,
                                                  "rope_scaling": RopeScaling(8.0)}])  # fmt: skip
def test_logits_with_the_cache_are_those_without(case):
    """Tokens fed in pieces of 7, 5 and 1; the cache has empty slots in between, which are masked."""
    model, params = tiny(**case)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 4096, (2, 13)))
    positions = jnp.broadcast_to(jnp.arange(13), (2, 13))
    expected = model.apply({"params": params}, tokens, positions, jnp.full((2, 13), 13))
    cache, seen, out = empty_cache(model, 2), np.zeros((2, 0), bool), []
    for start, end in ((0, 7), (7, 12), (12, 13)):
        T = end - start
        own = np.broadcast_to(np.tril(np.ones((T, T), bool)), (2, T, T))
        mask = np.concatenate([np.repeat(seen[:, None], T, 1), own], -1)
        states, new = extend(model, params, tokens[:, start:end], positions[:, start:end], cache, mask)
        out.append(model.apply({"params": params}, states, method="head"))
        junk = jax.tree.map(lambda x: jnp.full_like(x[:, :, :2], 1e3), new)
        cache = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), cache, new, junk)
        seen = np.concatenate([seen, np.ones((2, T), bool), np.zeros((2, min(2, T)), bool)], axis=1)
    np.testing.assert_allclose(np.concatenate(out, axis=1), expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 0.5


@pytest.mark.parity
@pytest.mark.parametrize("case", [{}, {"tie_word_embeddings": False, "num_kv_heads": 4, "rope_theta": 5e5,
                                       "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 16)}])  # fmt: skip
def test_greedy_equals_transformers(case):
    import torch
    from transformers import LlamaForCausalLM

    from tests.models.test_parity import from_torch, hf_config, randomize

    config = replace(TINY, **case)
    theirs = randomize(LlamaForCausalLM(hf_config(config, attn_implementation="eager")), seed=0)
    params, weights = from_torch(theirs, config)
    params = {"llama": params} | ({} if config.tie_word_embeddings else {"lm_head": weights["lm_head.weight"].T})
    mixed = prompts(6, longest=60)
    decoder = engine(Sampling(max_new_tokens=24), (CausalLM(config), params), batch_size=6)
    ours = texts(generate(decoder, [Request((prompt,)) for prompt in mixed]))
    for prompt, ids in zip(mixed, ours, strict=True):
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor(prompt[None], dtype=torch.long), attention_mask=torch.ones((1, len(prompt))),
                max_new_tokens=24, do_sample=False, eos_token_id=decoder.stops.tokens, pad_token_id=0,
            )  # fmt: skip
        assert tuple(out[0, len(prompt) :].tolist()) == ids


@pytest.mark.slow
def test_one_prompt_is_computed_once_for_all_settings_and_samples():
    prompt, labels = prompts(1, longest=60)[0], [np.array([9, 8, n, 4], np.int32) for n in range(5)]
    request = Request(tuple(np.concatenate([prompt, label]) for label in labels), samples=3)
    inputs = arrange([request], 1, slots=64, suffix=1)
    assert inputs.prefix.shape == (1, 64)
    assert inputs.prefix_lengths == [len(prompt) + 2]  # what all labels begin with is shared too
    assert inputs.suffix.tolist() == [[n] for n in range(5) for _ in range(3)]
    assert set(inputs.last) == {4}
    model = tiny()
    together = generate(engine(Sampling(1.0, max_new_tokens=8), model), [request])[0]
    for one, expected in zip(request.prompts, together, strict=True):
        alone = generate(engine(Sampling(1.0, max_new_tokens=8), model), [Request((one,), samples=3)])[0][0]
        assert [a.ids for a in alone] == [a.ids for a in expected]
        assert len({a.ids for a in alone}) == 3


@pytest.mark.slow
def test_text_does_not_depend_on_batch_order_or_size():
    model, mixed = tiny(), prompts(7)
    sampling = Sampling(0.9, top_k=40, top_p=0.95, seed=4, max_new_tokens=10)
    whole = texts(generate(engine(sampling, model, batch_size=7), [Request((p,)) for p in mixed]))
    alone = engine(sampling, model, batch_size=1)
    assert [texts(generate(alone, [Request((p,))]))[0] for p in mixed[:3]] == whole[:3]
    order = np.random.default_rng(1).permutation(7)
    resumed = engine(sampling, model, batch_size=1).run([Request((p,)) for p in mixed], done=5)
    assert [answer.ids for (answer,) in resumed] == whole[5:]
    shuffled = texts(generate(engine(sampling, model, batch_size=3), [Request((mixed[i],)) for i in order]))
    assert shuffled == [whole[i] for i in order]


@pytest.mark.slow
def test_eight_devices_give_the_same_text():
    model, requests = tiny(), [Request((p,)) for p in prompts(9)]
    sampling = Sampling(max_new_tokens=12)
    expected = texts(generate(engine(sampling, model), requests))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert texts(generate(engine(sampling, model, mesh=mesh, batch_size=4), requests)) == expected


def test_stops_at_the_end_of_turn():
    """A model that always draws one token: the end of turn, or one that is none."""
    model, params = tiny(tie_word_embeddings=False)
    one = jax.tree.map(np.zeros_like, params)
    one["llama"]["embedding"] += 1
    one["llama"]["final_norm"]["scale"] += 1
    for limit in (5, 1):
        decoder = engine(Sampling(max_new_tokens=limit), (model, one))
        for token, finish, count in (("<extra_id_1>", "stop", 1), ("a", "length", limit)):
            head = np.zeros((32, 4096), np.float32)
            head[:, TOKENIZER.token_id(token)] = 1
            decoder.params = unstacked(one | {"lm_head": head})
            (((answer,),),) = generate(decoder, [Request((prompts(1)[0],))])
            assert (answer.finish, answer.tokens) == (finish, count)
    assert generate(engine(Sampling(), (model, params)), []) == []


def test_stream_is_the_text_in_pieces():
    decoder = engine(Sampling(1.0, seed=2, max_new_tokens=20), template=CHATML)
    (prompt,) = prompts(1)
    *pieces, answer = decoder.stream(Request((prompt,)))
    assert answer == generate(decoder, [Request((prompt,))])[0][0][0]
    assert "".join(pieces) == answer.text
    assert sum(map(bool, pieces)) > 3


def watched(decoder, monkeypatch):
    """The shapes of the batches that it computes, and (requests at work, steps) of each run on the device."""
    shapes, steps, advance = [], [], decoder._advance

    def counted(how, shape, params, state, *limits):
        before, busy = int(state.count), int((~state.done).sum())
        state = advance(how, shape, params, state, *limits)
        shapes.append(shape)
        steps.append((busy, int(state.count) - before))
        return state

    monkeypatch.setattr(decoder, "_advance", counted)
    return shapes, steps


@pytest.mark.slow
def test_no_more_rows_are_computed_than_are_asked_for(monkeypatch):
    decoder = engine(Sampling(max_new_tokens=4), batch_size=8)
    shapes, _ = watched(decoder, monkeypatch)
    for count in (1, 3, 9):
        list(decoder.run([Request((p,)) for p in prompts(count)]))
    assert shapes == [Rows(1, 1, 1), Rows(1, 3, 1), Rows(1, 8, 1), Rows(1, 8, 1)]


@pytest.mark.slow
def test_requests_take_the_places_of_those_that_ended(monkeypatch):
    """Of 7 requests two in work at once. Ends come after 1 to 20 tokens; texts are those of each alone."""
    model, mixed = tiny(), [Request((p,)) for p in prompts(7, longest=150)]
    sampling = Sampling(1.0, seed=3, max_new_tokens=20)

    def frequent(decoder):  # one token in eight is an end
        decoder.stops.tokens = [*decoder.stops.tokens, *range(0, 4096, 8)]
        return decoder

    alone = frequent(engine(sampling, model, batch_size=1))
    expected = [texts(generate(alone, [request]))[0] for request in mixed]
    lengths = [len(ids) for ids in expected]
    assert len(set(lengths)) > 3
    decoder = frequent(engine(sampling, model, batch_size=2))
    _, steps = watched(decoder, monkeypatch)
    assert texts(generate(decoder, mixed)) == expected
    assert all(busy == 2 for busy, _ in steps)
    assert sum(count for _, count in steps) <= sum(lengths) / 2 + max(lengths)


def test_another_seed_compiles_nothing():
    first = engine(sampling := Sampling(1.0, seed=2, max_new_tokens=8))
    requests = [Request((prompts(1)[0],))]
    texts = {generate(first.drawing(replace(sampling, seed=seed), 8), requests)[0][0][0].text for seed in range(3)}
    assert len(texts) == 3
    assert (first._fill._cache_size(), first._advance._cache_size()) == (1, 1)


def test_a_step_does_not_copy_the_cache():
    model, params = tiny()
    decoder = engine(Sampling(max_new_tokens=4000), (model, params))
    rows = Rows(1, 8, 1)
    state = jax.eval_shape(functools.partial(decoder._empty, rows, 4000, 4064))
    memory = decoder._advance.lower(decoder.sampling, rows, decoder.params, state, 5, 1).compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes > size  # donated
    assert memory.temp_size_in_bytes < size / 4  # of two layers not the keys alone


def test_shapes():
    assert [bucket(n, 0) for n in (0, 1, 2, 3, 4, 5, 7, 9, 13, 33)] == [0, 1, 2, 4, 4, 8, 8, 16, 16, 64]
    requests = [Request((np.arange(n),)) for n in (5, 3, 9, 4, 7, 1, 8)]
    assert by_length(requests, 1, 3) == [1, 3, 2, 6, 4, 5]
    a = np.arange(5)
    assert common_length([a]) == 4
    assert common_length([a, a[:3]]) == 2
    assert common_length([a, np.array([0, 1, 9, 3])]) == 2


SMOLLM2 = os.environ.get("STEERJAX_SMOLLM2", "")


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2, reason="STEERJAX_SMOLLM2 is not set")
@pytest.mark.parity
@pytest.mark.smollm2
def test_smollm2_greedy_equals_transformers():
    """Real prompts of 20 to 400 tokens in batches of mixed length; logits with and without the cache. Six prompts of 32
    new tokens, or with STEERJAX_SLOW twenty of 64."""
    import torch
    from transformers import LlamaForCausalLM

    from steerjax.data.formats import prompt_turns
    from steerjax.data.readers import iter_rows

    bundle = open_bundle(SMOLLM2, template="chatml", dtype="float32")
    model, params, renderer = bundle.module, bundle.params, bundle.renderer(HELPSTEER)
    texts = list(dict.fromkeys(row["prompt"] for _, row in iter_rows("embedded:helpsteer")))
    conversations = [Conversation(prompt_turns({"prompt": text})) for text in texts if len(text) < 1200]
    count, new = (19, 64) if os.environ.get("STEERJAX_SLOW") else (5, 32)
    some = conversations[:: len(conversations) // count][:count]
    conversations = [*some, Conversation((Turn("user", "Name a prime."),))]
    mixed = [renderer.render(c, generation_prompt=True).tokens for c in conversations]
    decoder = Engine(bundle, HELPSTEER, Sampling(max_new_tokens=new))
    ours = [request[0][0] for request in generate(decoder, [Request((prompt,)) for prompt in mixed])]

    theirs = LlamaForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for number, (prompt, answer) in enumerate(zip(mixed, ours, strict=True)):
            assert answer.finish == "stop" or answer.tokens == new
            # Greedy is that each token is the most likely one after those before it: one pass says so.
            whole = torch.tensor(np.concatenate([prompt, answer.ids])[None].astype(np.int64))
            best = theirs(whole).logits[0, len(prompt) - 1 : -1].argmax(-1)
            assert tuple(best.tolist()) == answer.ids
            if number % 7 == 0:
                out = theirs.generate(whole[:, : len(prompt)], max_new_tokens=new, do_sample=False, pad_token_id=0,
                                      eos_token_id=decoder.stops.tokens)  # fmt: skip
                assert tuple(out[0, len(prompt) :].tolist()) == answer.ids

    # The cache changes no logits. (Each place is compiled anew.)
    tokens = jnp.asarray(np.concatenate([mixed[0], ours[0].ids])[None, :96])
    T = tokens.shape[1]
    positions = jnp.arange(T)[None]
    expected = model.apply({"params": params}, tokens, positions, jnp.full((1, T), T))[0, -2:]
    _, cache = extend(model, params, tokens[:, :-2], positions[:, :-2], empty_cache(model, 1),
                      jnp.tril(jnp.ones((1, T - 2, T - 2), bool)))  # fmt: skip
    for place in range(T - 2, T):
        mask = jnp.ones((1, 1, place + 1), bool)
        at = slice(place, place + 1)
        states, new = extend(model, params, tokens[:, at], positions[:, at], cache, mask)
        logits = model.apply({"params": params}, states[:, 0], method="head")[0]
        np.testing.assert_allclose(logits, expected[place - T + 2], atol=1e-4, rtol=0)
        cache = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), cache, new)
