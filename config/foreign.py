"""Names that other programs have for settings of ours, so that a flag of theirs is answered with ours.

They are those of the command lines of transformers' Trainer (TrainingArguments) and its examples, PEFT, TRL,
Lightning, nanoGPT, lm-evaluation-harness, vLLM and Optuna.
"""

from __future__ import annotations

from collections.abc import Collection

# Which of the learning rates is meant, the other settings say: parse_config answers these two.
RATES = ("--lr", "--learning_rate")
# Ours -> theirs. A command has the first of ours that is a flag of it.
NAMES = {
    "--max_epochs": "num_train_epochs num_epochs epochs",
    "--max_steps": "max_iters max_train_steps num_train_steps train_steps",
    "--batch_size": "per_device_train_batch_size train_batch_size micro_batch_size per_device_batch_size "
    "per_device_eval_batch_size eval_batch_size",
    "--accumulation": "gradient_accumulation_steps grad_accum_steps accumulate_grad_batches",
    "--optimizer.warmup_steps": "num_warmup_steps warmup_iters",
    "--optimizer.schedule": "lr_scheduler_type lr_scheduler",
    "--optimizer.name": "optim optimizer_type",
    "--optimizer.beta1": "adam_beta1",
    "--optimizer.beta2": "adam_beta2",
    "--optimizer.eps": "adam_epsilon",
    "--optimizer.grad_clip": "max_grad_norm gradient_clip_val clip_grad",
    "--optimizer.label_smoothing": "label_smoothing_factor",
    "--out": "output_dir out_dir save_dir output_path",
    "--study": "output_dir out_dir study_name",
    "--folder": "output_dir out_dir",
    "--run": "output_dir out_dir save_dir checkpoint_dir",
    "--model": "model_name_or_path model_name pretrained_model_name_or_path base_model",
    "--base": "model_name_or_path model_name pretrained_model_name_or_path base_model",
    "--base_revision": "model_revision",
    "--held": "load_in_4bit load_in_8bit quantization",
    "--base_format": "load_in_4bit load_in_8bit quantization",
    "--adapter": "peft_model peft adapter_name_or_path lora_path",
    "--tokenizer.path": "tokenizer_name tokenizer_name_or_path",
    "--row_length": "max_seq_length max_seq_len max_length model_max_length sequence_length seq_length",
    "--model.block_size": "context_length max_position_embeddings",
    "--max_new_tokens": "max_tokens max_length max_gen_toks",
    "--suite_file": "dataset dataset_name dataset_path",
    "--source": "train_file dataset dataset_name dataset_path data_dir data_path",
    "--data.source": "train_file dataset dataset_name dataset_path data_dir data_path",
    "--validate_every": "eval_steps eval_interval eval_every val_check_interval",
    "--save_every": "save_steps save_interval",
    "--keep": "save_total_limit save_top_k",
    "--log_every": "logging_steps log_interval log_every_n_steps",
    "--log": "report_to log_with loggers",
    "--resume": "resume_from_checkpoint init_from",
    "--activation_checkpointing": "gradient_checkpointing",
    "--compile": "torch_compile",
    "--dtype": "bf16 fp16 torch_dtype",
    "--precision": "bf16 fp16 torch_dtype mixed_precision",
    "--patience": "early_stopping_patience",
    "--model.n_layer": "num_layers num_hidden_layers n_layers",
    "--model.n_head": "num_attention_heads num_heads n_heads",
    "--model.n_kv_head": "num_key_value_heads",
    "--model.n_embd": "hidden_size d_model",
    "--model.n_inner": "intermediate_size ffn_dim d_ff",
    "--lora.r": "lora_r lora_rank",
    "--lora.alpha": "lora_alpha",
    "--lora.dropout": "lora_dropout",
    "--lora.targets": "target_modules lora_target_modules",
    "--lora.train_modules": "modules_to_save",
    "--lora.dora": "use_dora",
    "--lora.rslora": "use_rslora",
    "--workers": "num_workers num_proc n_jobs",
    "--data.workers": "num_workers num_proc dataloader_num_workers preprocessing_num_workers",
    "--suite": "tasks",
    "--samples_per_example": "n_samples num_return_sequences",
    "--samples": "limit max_eval_samples",
    "--temperature": "do_sample",
    "--stop": "stop_sequences stop_strings until",
    "--num_beams": "beam_size",
    "--trials": "n_trials num_samples",
    "--seconds": "timeout",
}


def ours_of(flag: str, known: Collection[str]) -> str:
    """Return the flag among the known ones for which another program says `flag`, or nothing."""
    name = flag.removeprefix("--")
    return next((ours for ours, theirs in NAMES.items() if ours in known and name in theirs.split()), "")
