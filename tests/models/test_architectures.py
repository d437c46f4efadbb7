"""Every architecture against plain transformers in float32: log-probabilities, answers, packing, LoRA, frozen layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from programs.tiny_models import ATTENTION, STATE, build_config, build_model, save_model
from torch import Tensor
from trl import ModelConfig

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.evaluation.language_model import perplexity
from rlhf_recipes.evaluation.models import completion_log_probs
from rlhf_recipes.generation import Sampling, sample
from rlhf_recipes.models import (
    attach_adapter,
    build_lora_config,
    check_fused_head,
    check_left_padding,
    check_packing,
    context_length,
    disable_dropout_,
    load_causal_lm,
    refuse_encoder,
    refuse_left_padding,
    refuse_logits_unknown_to_trl,
    refuse_packing,
    text_config,
    vocabulary_size,
)
from rlhf_recipes.models.lora import GPT2_LORA_TARGETS
from rlhf_recipes.optimizations import UpperLayers, freeze_lower_layers_, fuse_kernels_, lower_layers
from rlhf_recipes.ppo.roles.outputs import check_head, policy_outputs
from rlhf_recipes.ppo.rollout.rollout import pad_episodes
from rlhf_recipes.scoring import load_reward

PROMPTS = [
    [5, 9],
    [3, 250, 7, 8, 100],
    [77],
    [1, 2, 3, 4, 5, 6, 7, 8, 9],
    [200, 31, 4],
    [6, 10],
    [40, 41, 42],
]  # some of one length
ANSWERS = [[11, 12, 13], [14], [15, 16, 17, 18], [19, 20], [21, 22, 23, 24, 25], [26, 27], [28]]
NEW_TOKENS = 8
EVERY = [*ATTENTION, *STATE]
PACKS = set(ATTENTION) - {"opt", "bloom", "mpt", "falcon", "gpt_neo"}
# transformers has no sequence classifier for these, so no reward model.
NO_CLASSIFIER = {
    "granite", "cohere", "mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "lfm2", "falcon_h1", "bamba", "rwkv",
}  # fmt: skip
SPLITS = {
    "gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "stablelm", "olmo",
    "olmo2", "granite", "cohere", "smollm3", "mixtral", "qwen3_moe", "falcon_h1",
}  # fmt: skip


@pytest.fixture(scope="module")
def model_of() -> Any:
    """Return a function (name) that returns the tiny model of an architecture; tests that change it build their own."""
    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in models:
            models[name] = build_model(name)
        return models[name]

    return get


def logits_alone(model: Any, ids: list[int]) -> Tensor:
    """Return plain transformers' logits of one row without padding or cache, (tokens, vocabulary)."""
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.tensor([ids]), use_cache=False).logits)[0].float()


def log_probs_alone(model: Any, prompt: list[int], answer: list[int], temperature: float = 1.0) -> Tensor:
    rows = torch.log_softmax(logits_alone(model, [*prompt, *answer]) / temperature, dim=-1)
    return rows[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)


def greedy_alone(model: Any, prompt: list[int], stops: tuple[int, ...] = ()) -> list[int]:
    """Return the likeliest tokens one by one, each from a pass over the whole row: no cache, no padding."""
    row = list(prompt)
    while len(row) < len(prompt) + NEW_TOKENS and not (len(row) > len(prompt) and row[-1] in stops):
        row.append(int(logits_alone(model, row)[-1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("name", EVERY)
def test_log_probabilities_equal_plain_transformers(name: str, model_of: Any) -> None:
    model = model_of(name)
    check_head(model)
    with torch.no_grad():
        _, log_probs, _ = policy_outputs(model, **pad_episodes(PROMPTS, ANSWERS), temperature=0.7)
    evaluated, _ = completion_log_probs(model, PROMPTS, ANSWERS, 0.7)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        expected = log_probs_alone(model, prompt, answer, 0.7)
        assert torch.allclose(log_probs[row, : len(answer)], expected, atol=2e-5), name
        assert torch.allclose(evaluated[row, : len(answer)], expected, atol=2e-5), name


@pytest.mark.parametrize("name", EVERY)
def test_greedy_answers_in_a_batch_equal_those_of_each_prompt_alone(name: str, model_of: Any) -> None:
    """One row stops before the others, at a token that it gives itself."""
    model = model_of(name)
    stop = greedy_alone(model, PROMPTS[0])[3]
    stops = (stop, 9999)  # 9999: an id that no model has
    expected = [greedy_alone(model, prompt, stops) for prompt in PROMPTS]
    answers = sample(model, PROMPTS, Sampling(NEW_TOKENS, 0.0, stop_ids=stops), list(range(len(PROMPTS))))
    assert answers.ids == expected
    assert len({len(row) for row in expected}) > 1, "a row stops early"
    assert answers.stopped == [row[-1] == stop for row in expected]


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next", "rwkv", "gpt2"])
def test_sampled_answers_do_not_depend_on_the_batch(name: str, model_of: Any) -> None:
    sampling = Sampling(NEW_TOKENS, 1.0, min_new_tokens=2, stop_ids=tuple(range(0, 250, 2)))
    seeds = list(range(len(PROMPTS)))
    together = sample(model_of(name), PROMPTS, sampling, seeds)
    alone = [sample(model_of(name), [row], sampling, [seed]).ids[0] for row, seed in zip(PROMPTS, seeds, strict=True)]
    assert together.ids == alone
    assert all(len(row) >= 3 for row in alone), "no stop token among the first two"


@pytest.mark.parametrize("name", EVERY)
def test_packed_rows_equal_separate_rows_or_are_refused(name: str, model_of: Any) -> None:
    """The truth is measured; the refusals by config and by behaviour must agree with it."""
    model, rows = model_of(name), [[*prompt, *answer] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    separate = torch.cat([logits_alone(model, row) for row in rows])
    packed = {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[index for row in rows for index in range(len(row))]]),
    }
    if name in PACKS:
        refuse_packing(model.config, name)
        check_packing(model, name)
        with torch.no_grad():
            assert torch.allclose(model(**packed, use_cache=False).logits[0], separate, atol=1e-4)
        return
    if name == "gpt_neo":  # right as a row, and too long for its mask as a batch
        with pytest.raises(UserError, match="has a mask for 128 tokens"):
            refuse_packing(model.config, name)
        return
    with pytest.raises(UserError, match="would read the neighbours of a packed row"):
        refuse_packing(model.config, name)
    with pytest.raises(UserError, match="would read the neighbours of a packed row"):
        check_packing(model, name)


@pytest.mark.parametrize("name", EVERY)
def test_left_padding_is_invisible_or_refused(name: str, model_of: Any) -> None:
    """TRL's online trainer generates from prompts that are padded on the left."""
    model = model_of(name)
    width = max(len(prompt) for prompt in PROMPTS)
    ids = torch.tensor([[257] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 257}
    batch = model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    alone = [model.generate(torch.tensor([row]), **options)[0, len(row) :].tolist() for row in PROMPTS]
    if name in ("minimax", "rwkv"):
        assert batch != alone
        with pytest.raises(UserError, match="reads the padding before a prompt"):
            refuse_left_padding(model.config, name)
        return
    assert batch == alone
    refuse_left_padding(model.config, name)
    check_left_padding(model, name, 257)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("targets", [None, ["all-linear"]])
def test_lora_attaches_and_merges_to_the_same_logits(name: str, targets: Any, tmp_path: Path) -> None:
    options = ModelConfig(use_peft=True, lora_r=2, lora_target_modules=targets)
    model = build_model(name)
    before = logits_alone(model, PROMPTS[3])
    config = build_lora_config(options, model.config)
    adapted = attach_adapter(model, config).eval()
    weights = [weight for weight_name, weight in adapted.named_parameters() if ".lora_" in weight_name]
    for index, weight in enumerate(weights):
        torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(index))
    expected = logits_alone(adapted, PROMPTS[3])
    assert (expected - before).abs().max() > 1e-3
    build_model(name).save_pretrained(tmp_path / "base")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load_causal_lm(str(tmp_path / "adapter")).eval()
    assert torch.allclose(logits_alone(merged, PROMPTS[3]), expected, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", EVERY)
def test_frozen_lower_layers_equal_the_whole_model_or_are_refused(name: str) -> None:
    model = build_model(name)
    episodes = pad_episodes(PROMPTS, ANSWERS)
    if name not in SPLITS:
        with pytest.raises(UserError, match="num_layers_unfrozen does not know"):
            freeze_lower_layers_(model, 1)
        return
    freeze_lower_layers_(model, 1)
    with torch.no_grad():
        ids = episodes["input_ids"]
        states = lower_layers(model, 1)(input_ids=ids, use_cache=False).last_hidden_state
        _, log_probs, _ = policy_outputs(UpperLayers(model, 1), **episodes, lower_states=states)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        assert torch.allclose(log_probs[row, : len(answer)], log_probs_alone(model, prompt, answer), atol=2e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_reward_model_scores_a_batch_as_each_row_alone(name: str, tokenizer: Any) -> None:
    if name in NO_CLASSIFIER:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            build_model(name, labels=1)
        return
    model = build_model(name, labels=1)
    rows = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    reward = load_reward(fuse_kernels_(model, torch.device("cpu")), tokenizer)
    together, alone = reward.score_ids(rows), [reward.score_ids([row])[0] for row in rows]
    with torch.no_grad():
        plain = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-5)
    assert torch.allclose(torch.tensor(together), torch.tensor(plain), atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "falcon_h1", "recurrent_gemma"])
def test_logits_that_a_trl_trainer_computes_otherwise_are_refused(name: str) -> None:
    """TRL multiplies with the head itself. It knows most caps and scales, and not RecurrentGemma's."""
    from trl.trainer.utils import add_fused_lm_head

    model = build_model(name)
    add_fused_lm_head(model)
    if name == "recurrent_gemma":
        for check in (lambda: refuse_logits_unknown_to_trl(model.config, name), lambda: check_fused_head(model, name)):
            with pytest.raises(UserError, match="TRL"):
                check()
        return
    refuse_logits_unknown_to_trl(model.config, name)
    check_fused_head(model, name)


def test_lora_targets_by_default_are_those_of_the_architecture() -> None:
    def targets(name: str, **options: Any) -> Any:
        config = build_lora_config(ModelConfig(use_peft=True, **options), build_config(name))
        assert config is not None
        return config.target_modules

    assert set(targets("gpt2")) == set(GPT2_LORA_TARGETS)
    assert set(targets("llama")) == {"q_proj", "v_proj"}
    assert targets("olmo2") == "all-linear"
    assert targets("gpt2", lora_target_modules=["c_attn"]) == {"c_attn"}, "one name is a name, not a pattern"
    assert (
        targets("llama", lora_target_modules=[r".*layers\.1\.self_attn\.q_proj"]) == r".*layers\.1\.self_attn\.q_proj"
    )


def test_lora_on_experts_has_no_dropout(caplog: pytest.LogCaptureFixture) -> None:
    """peft adapts fused experts by their parameters, and refuses dropout there."""
    options = ModelConfig(use_peft=True, lora_target_modules=["all-linear"], lora_dropout=0.1)
    assert build_lora_config(options, build_config("mixtral")).lora_dropout == 0.0
    assert "cannot have dropout" in caplog.text
    assert build_lora_config(options, build_config("llama")).lora_dropout == 0.1
    named = ModelConfig(use_peft=True, lora_target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    adapted = attach_adapter(build_model("mixtral"), build_lora_config(named, build_config("mixtral")))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert trained and all("experts" in name for name in trained)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"lora_target_modules": ["c_attn"]}),
        ("llama", {"lora_target_parameters": ["experts.gate_up_proj"]}),
        ("llama", {"lora_target_modules": ["norm"]}),
        ("mixtral", {"lora_target_modules": ["all-linear"], "use_dora": True}),
        ("mamba2", {"lora_target_modules": ["out_proj"]}),
        ("jamba", {"lora_target_modules": ["dt_proj", "q_proj"]}),
    ],
)
def test_lora_that_does_not_fit_is_refused_without_weights(name: str, options: Any) -> None:
    state = torch.random.get_rng_state()
    with pytest.raises(UserError) as caught:
        build_lora_config(ModelConfig(use_peft=True, **options), build_config(name))
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.random.get_rng_state(), state), "the check draws no random numbers"


def test_numbers_of_a_multimodal_config_are_those_of_its_text_model() -> None:
    from transformers import Gemma3Config

    config = Gemma3Config(text_config=build_config("gemma3").to_dict())
    assert (context_length(config), vocabulary_size(config), text_config(config).hidden_size) == (128, 262, 32)
    assert context_length(build_config("mpt")) == 128, "MPT's ALiBi is built up to max_seq_len"
    assert context_length(build_config("bloom")) is None
    assert context_length(build_config("mamba")) is None


@pytest.mark.parametrize("max_length", [None, 16])
def test_perplexity_of_a_model_without_a_context_length(max_length: int | None, model_of: Any, tokenizer: Any) -> None:
    model, text = model_of("bloom"), "a text of some length for a model that has no limit"
    ids = [256, *text.encode()]
    measured = perplexity(model, tokenizer, [text], max_length=max_length)
    if max_length is None:
        assert measured["loss"] == pytest.approx(-log_probs_alone(model, ids[:1], ids[1:]).mean().item(), abs=1e-5)
    assert measured["tokens"] == len(text)


def test_ids_without_a_token_are_never_sampled_and_have_no_probability() -> None:
    """Of 262 embeddings 200 are tokens: the distribution over those is the model's, normalized."""
    model = build_model("qwen2", seed=1)
    sampling = Sampling(NEW_TOKENS, 1.0, vocabulary=200)
    answers = sample(model, PROMPTS * 8, sampling, list(range(56)))
    assert max(token for row in answers.ids for token in row) < 200
    everything = sample(model, PROMPTS * 8, Sampling(NEW_TOKENS, 1.0), list(range(56)))
    assert max(token for row in everything.ids for token in row) >= 200, "without the limit some are"
    episodes = pad_episodes(PROMPTS, ANSWERS)
    with torch.no_grad():
        _, log_probs, entropies = policy_outputs(model, **episodes, vocabulary=200)
    evaluated, _ = completion_log_probs(model, PROMPTS, ANSWERS, vocabulary=200)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        logits = logits_alone(model, [*prompt, *answer])[len(prompt) - 1 : -1, :200].double()
        expected = torch.log_softmax(logits, dim=-1)
        chosen = expected.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1).float()
        assert torch.allclose(log_probs[row, : len(answer)], chosen, atol=1e-5)
        assert torch.allclose(evaluated[row, : len(answer)], chosen, atol=1e-5)
        entropy = -(expected.exp() * expected).sum(-1).float()
        assert torch.allclose(entropies[row, : len(answer)], entropy, atol=1e-4)


def test_a_generation_config_that_cannot_be_saved_is_repaired_as_it_is_loaded(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Llama 2's has a temperature without do_sample; transformers reads it, and does not write it once it is changed."""
    folder = save_model(tmp_path / "model", "llama", tokenizer)
    Path(folder, "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 256}')
    model = load_causal_lm(folder)
    assert "do_sample" in caplog.text
    model.generation_config.pad_token_id = 257
    model.save_pretrained(tmp_path / "again")
    assert load_causal_lm(str(tmp_path / "again")).generation_config.temperature == 0.9
    Path(folder, "generation_config.json").write_text('{"length_penalty": 0.5, "eos_token_id": 256}')
    model = load_causal_lm(folder)
    assert "keeps its special tokens only" in caplog.text
    model.generation_config.pad_token_id = 257
    model.save_pretrained(tmp_path / "again")
    assert load_causal_lm(str(tmp_path / "again")).generation_config.eos_token_id == 256


def test_ids_beyond_the_embedding_are_named() -> None:
    from rlhf_recipes.models import check_stop_id, check_token_ids

    check_token_ids([[0, 5], [9]], 10, "row")
    with pytest.raises(UserError, match="row 1 has the id 10, and the model has 10 token embeddings"):
        check_token_ids([[0], [3, 10]], 10, "row")
    with pytest.raises(UserError, match="stop_token_id is -1"):
        check_stop_id(-1, 10)


def test_rwkv_keeps_its_weights_in_eval_mode(tokenizer: Any, tmp_path: Path) -> None:
    """transformers halves weights of every sixth layer for inference in place, and would save them so."""
    folder = save_model(tmp_path / "model", "rwkv", tokenizer, num_hidden_layers=7)
    model = load_causal_lm(folder).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits_alone(model, PROMPTS[0])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["xglm", "biogpt", "opt", "gpt2"])
def test_dropout_is_off_also_where_a_rate_is_a_plain_number(name: str) -> None:
    """XGLM and BioGPT drop attention weights by a number that no module holds."""
    rates = ("dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "hidden_dropout_prob")
    config = build_config(name)
    model = build_model(name, **{rate: 0.5 for rate in rates if rate in dir(config)})
    ids = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        expected, noisy = model(input_ids=ids).logits, model.train()(input_ids=ids).logits
        assert not torch.allclose(expected, noisy, atol=1e-3), "dropout is on"
        disable_dropout_(model)
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)


def test_an_encoder_is_refused_as_a_reward_model_before_its_weights_are_read(make_tokenizer: Any) -> None:
    """Its classifier reads a row at the first token, and an answer ends at its last."""
    from transformers import RobertaConfig

    tokenizer = make_tokenizer()
    refuse_encoder(build_config("llama"), tokenizer, "m")
    tokenizer.cls_token = tokenizer.bos_token
    refuse_encoder(build_config("llama"), tokenizer, "m")
    with pytest.raises(UserError, match="RobertaForSequenceClassification, which reads a row at its first token"):
        refuse_encoder(RobertaConfig(vocab_size=262, hidden_size=32, num_attention_heads=4), tokenizer, "m")
    with pytest.raises(UserError, match="no sequence classifier for a mamba2"):
        refuse_encoder(build_config("mamba2"), tokenizer, "m")
