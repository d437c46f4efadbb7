"""Pretraining: train a GPT-2 language model on text, from scratch by named size or from a checkpoint."""

import math
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_model_param_count
from trl import ModelConfig

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    TEXT,
    FormOptions,
    LoadedRows,
    load_rows,
    log_first_row,
    pack_documents,
    require_batch,
    text_options,
)
from rlhf_recipes.evaluation import perplexity
from rlhf_recipes.models import (
    SIZES,
    build_gpt2,
    context_length,
    hidden_size_of,
    is_reward_model,
    load_causal_lm,
    load_config,
    load_tokenizer,
    vocabulary_size,
    will_be_quantized,
)
from rlhf_recipes.training import (
    Measured,
    PretrainTrainer,
    SampleContinuations,
    TrainingDefaults,
    check_best_metric,
    collate_blocks,
    measures_model,
    prepare_process_,
    run_training,
    training_inputs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Size = Literal["nano", "tiny", "mini", "gpt2", "medium", "large", "xl"]
NEW_MODEL_DROPOUT = 0.1  # as GPT-2 was trained


@dataclass
class PretrainArguments(DatasetArguments):
    """The text, the tokenizer and the size of the model."""

    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer: a folder or Hub id. Unset: the one beside model_name_or_path."}
    )
    model_size: Size | None = field(
        default=None,
        metadata={
            "help": "Size of a new GPT-2: nano (0.5M parameters), tiny (1M), mini (10M), gpt2 (124M), medium, large "
            "or xl. Unset: start from model_name_or_path."
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Context in tokens; documents are packed to it. Unset: the model's own."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    dropout: float | None = field(
        default=None, metadata={"help": "Dropout. Unset: 0.1 for a new model, the checkpoint's own otherwise."}
    )
    l1_penalty: float = field(
        default=0.0, metadata={"help": "Weight of an L1 penalty: the sum of |w| over the weights under weight decay."}
    )
    sample_prompts: list[str] | None = field(
        default=None, metadata={"help": "Texts to continue at each evaluation and at the end (samples.md)."}
    )
    sample_tokens: int = field(default=48, metadata={"help": "Tokens of each continuation."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read and pack rows while training; needs max_steps."}
    )

    def __post_init__(self) -> None:
        if self.model_size is not None and self.model_size not in get_args(Size):
            raise UserError(f"unknown model_size {self.model_size!r}; choose one of {', '.join(SIZES)}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; give a share from 0 up to, not including, 1")
        if self.l1_penalty < 0:
            raise UserError(f"l1_penalty is {self.l1_penalty}; give 0 or more")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}; give at least 2 tokens")
        if self.sample_tokens < 1:
            raise UserError(f"sample_tokens is {self.sample_tokens}; give at least 1")


@dataclass
class PretrainConfig(TrainingDefaults, TrainingArguments):
    """`TrainingArguments` with the values GPT-2-sized models are pretrained with (Brown et al. 2020, table 2.1)."""

    output_dir: str = field(default="runs/pretrain", metadata={"help": "Output folder for the model."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the text."})
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "cosine, linear, ... from the peak down."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Steps, or a share of all steps, up to the peak."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay, not applied to biases and layer norms."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Decay of Adam's second moment."})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Maximum gradient norm; larger gradients are scaled down."}
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "adamw_torch_fused, sgd, adamw_8bit, ..."})


def build_pretrain_trainer(
    arguments: PretrainArguments, model_config: ModelConfig, training: PretrainConfig
) -> PretrainTrainer:
    """Build the trainer. Invalid options and text raise a `UserError` before weights are loaded or made."""
    tokenizer, context = _check_model(arguments, model_config, trust_remote_code=training.trust_remote_code)
    tokenizer.model_max_length = context
    rows = _load_texts(arguments, training)
    prompts = arguments.sample_prompts or []
    samples = SampleContinuations(prompts, tokenizer, arguments.sample_tokens, context, training.seed)
    blocks = pack_documents(rows.train, tokenizer, context)
    _require_one_step(blocks, training, context)
    log_first_row(next(iter(blocks))["input_ids"], tokenizer, "first block")
    texts = list(rows.test["text"]) if rows.test is not None else []
    test_blocks = pack_documents(rows.test, tokenizer, context) if texts else None
    if training.eval_strategy != "no" and not test_blocks:
        raise UserError(
            f"eval_strategy is {training.eval_strategy.value}, but the dataset has no split "
            f"{arguments.dataset_test_split!r} of at least {context} tokens; add one or pass --eval_strategy no"
        )
    check_best_metric(training, ["loss"])
    model = _make_model(arguments, model_config, tokenizer, context, training)
    trainer = PretrainTrainer(
        model=model,
        args=prepare_process_(training, hidden_size_of(model.config)),
        train_dataset=blocks,
        eval_dataset=test_blocks or None,
        data_collator=collate_blocks,
        processing_class=tokenizer,
        callbacks=[samples] if prompts else [],
        l1_penalty=arguments.l1_penalty,
        held_out_texts=texts,
    )
    trainer.row_counts = rows.counts
    return trainer


def run_pretrain(arguments: PretrainArguments, model_config: ModelConfig, training: PretrainConfig) -> Path:
    """Pretrain and leave a folder with the model, its tokenizer and its metrics on the held-out text."""
    texts = [arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    return run_training(
        "pretrain",
        [arguments, model_config, training],
        lambda: build_pretrain_trainer(arguments, model_config, training),
        measure_pretrain,
        title="GPT-2 language model",
        parents={
            "text": ", ".join(filter(None, texts)),
            "tokenizer": arguments.tokenizer_name,
            "model": model_config.model_name_or_path,
        },
        inputs=training_inputs(model_config, arguments, arguments.tokenizer_name),
        plot_title="Pretraining",
        measure_before=lambda trainer: measure_pretrain(trainer).metrics,
    )


def measure_pretrain(trainer: PretrainTrainer, folder: Path | None = None) -> Measured:
    """Return the number of parameters, and perplexity and bits per byte of the held-out documents, if there are any.

    They are measured in the precision of the weights. All ranks must call it.
    """
    metrics: dict[str, Any] = {}
    if trainer.held_out_texts and measures_model(trainer):
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        measured = perplexity(
            model,
            trainer.processing_class,
            trainer.held_out_texts,
            batch_size=trainer.args.per_device_eval_batch_size,
            max_length=None if context_length(model.config) else trainer.processing_class.model_max_length,
            progress=True,
        )
        metrics = {key: measured[key] for key in ("perplexity", "bits_per_byte", "loss")}
        metrics["held_out_tokens"] = measured["tokens"]
    if trainer.is_world_process_zero():
        metrics["parameters"] = get_model_param_count(trainer.model)
    return Measured(metrics)


def _check_model(
    arguments: PretrainArguments, model_config: ModelConfig, **code: Any
) -> "tuple[PreTrainedTokenizerBase, int]":
    """Check model and tokenizer by their small files; return the tokenizer and the context in tokens."""
    checkpoint = model_config.model_name_or_path
    if (arguments.model_size is None) == (checkpoint is None):
        raise UserError("give one of --model_size (a new model) and --model_name_or_path (start from a checkpoint)")
    if model_config.use_peft or model_config.load_in_4bit or model_config.load_in_8bit:
        raise UserError("pretrain trains all weights; for LoRA and quantized models use the sft stage")
    if checkpoint is None and model_config.dtype not in (None, "auto", "float32"):
        raise UserError("a new model's weights are float32; for mixed precision pass --bf16 true instead of --dtype")
    name = arguments.tokenizer_name or checkpoint
    if name is None:
        raise UserError("no tokenizer; pass --tokenizer_name with a folder that the tokenizer stage left, or a Hub id")
    if checkpoint is None:
        return load_tokenizer(name, **code), arguments.max_length or SIZES[str(arguments.model_size)]["n_positions"]
    config = load_config(checkpoint, revision=model_config.model_revision, **code)
    if will_be_quantized(model_config, config):
        raise UserError(
            f"model {checkpoint} is quantized to 4 or 8 bits; pretrain trains all weights, so give one in full precision"
        )
    if is_reward_model(checkpoint, **code):
        raise UserError(f"model {checkpoint} is a reward model, which predicts no text; start from a language model")
    tokenizer = load_tokenizer(name, **code)
    too_many = len(tokenizer) > (vocabulary_size(config) or math.inf)
    if too_many or _has_other_vocabulary(tokenizer, checkpoint, arguments.tokenizer_name, **code):
        raise UserError(
            f"tokenizer {name} has another vocabulary than the model {checkpoint} was trained with; "
            "leave --tokenizer_name out, or start a new model with --model_size"
        )
    limit = context_length(config) or arguments.max_length
    context = arguments.max_length or limit
    if context is None:
        raise UserError(f"model {checkpoint} states no context length; pass --max_length")
    if limit is not None and context > limit:
        raise UserError(f"max_length {context} is beyond the {limit} tokens that {checkpoint} reads; lower it")
    return tokenizer, context


def _has_other_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", checkpoint: str, name: str | None, **code: Any
) -> bool:
    if name is None or name == checkpoint:
        return False
    try:
        own = load_tokenizer(checkpoint, **code)
    except UserError:
        return False  # a checkpoint without tokenizer files: only the number of tokens can be compared
    return bool(own.get_vocab() != tokenizer.get_vocab())


def _load_texts(arguments: PretrainArguments, training: PretrainConfig) -> LoadedRows:
    if arguments.dataset_streaming and training.max_steps <= 0:
        raise UserError("a streamed dataset has no known length; pass --max_steps")
    options = text_options(FormOptions((TEXT,)), arguments.text_column)
    return load_rows(arguments, options, streaming=arguments.dataset_streaming)


def _require_one_step(blocks: Any, training: PretrainConfig, context: int) -> None:
    needed = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    count = sum(1 for _ in islice(blocks, needed))  # a stream has no length
    require_batch(count, training, f"the text, packed into blocks of {context} tokens,")


def _make_model(
    arguments: PretrainArguments,
    model_config: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    training: PretrainConfig,
) -> "PreTrainedModel":
    from transformers import set_seed

    set_seed(training.seed)
    if model_config.model_name_or_path is not None:
        options: dict[str, Any] = {} if arguments.dropout is None else _dropout_rates(arguments.dropout)
        options["trust_remote_code"] = training.trust_remote_code
        return load_causal_lm(model_config.model_name_or_path, model_config, **options)
    dropout = NEW_MODEL_DROPOUT if arguments.dropout is None else arguments.dropout
    model = build_gpt2(str(arguments.model_size), tokenizer, positions=context, dropout=dropout)
    if model_config.attn_implementation:
        model.set_attn_implementation(model_config.attn_implementation)
    return model


def _dropout_rates(rate: float) -> dict[str, float]:
    return {"resid_pdrop": rate, "attn_pdrop": rate, "embd_pdrop": rate}
