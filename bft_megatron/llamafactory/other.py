"""The fields without counterpart: those that need none, and those that would change the run, each with the reason."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Any

from bft_megatron.llamafactory.conversion import Conversion

# Leaving these out changes nothing in the run. * stands for any text, as in a file name pattern.
NOT_NEEDED = {
    "every step's numbers are in metrics.jsonl and TensorBoard": (
        "logging_*", "plot_loss", "report_to", "run_name", "project", "trackio_*", "use_swanlab", "swanlab_*",
        "disable_tqdm", "debug", "log_level*", "log_on_each_node", "compute_accuracy",
        "include_effective_tokens_per_second", "include_num_input_tokens_seen", "include_tokens_per_second",
        "print_param_status", "skip_memory_metrics", "enable_torch_profiler", "profiler_*", "profile_modules",
    ),
    "the data are prepared once, beforehand": (
        "preprocessing_*", "overwrite_cache", "dataloader_*", "streaming", "buffer_size", "data_shared_file_system",
        "ignore_pad_token_for_loss", "remove_unused_columns", "label_names", "group_by_length",
        "train_sampling_strategy", "length_column_name", "split_special_tokens", "media_dir",
    ),
    "the same command goes on where a run stopped, from whole checkpoints": (
        "overwrite_output_dir", "save_only_model", "save_safetensors", "save_on_each_node", "ignore_data_skip",
        "restore_callback_states_from_checkpoint", "ckpt_*", "distrib_optim_*", "enable_jit_checkpoint",
        "full_determinism",
    ),
    "`bft-megatron export` writes the Hugging Face model": (
        "export_*", "save_hf_model", "save_merged_model", "push_to_hub", "hub_*",
    ),
    "layers, kernels and communication are Megatron's": (
        "flash_attn", "enable_liger_kernel", "use_liger_kernel", "liger_kernel_config", "use_unsloth",
        "use_unsloth_gc", "use_v1_kernels", "torch_compile*", "use_reentrant_gc", "gradient_checkpointing*",
        "activation_checkpointing*", "low_cpu_mem_usage", "upcast_layernorm", "upcast_lmhead_output", "use_cache",
        "use_kv_cache", "tf32", "ddp_*", "fsdp_*", "accelerator_config", "torch_empty_cache_steps",
        "auto_find_batch_size", "use_cpu", "local_rank", "bias_activation_fusion", "apply_rope_fusion",
        "masked_softmax_fusion", "cross_entropy_loss_fusion", "use_distributed_optimizer", "calculate_per_token_loss",
        "variable_seq_lengths", "overlap_p2p_comm", "delay_grad_reduce", "check_for_nan_in_loss_and_grad",
        "accumulate_allreduce_grads_in_fp32", "transformer_impl", "cuda_graph_*", "compile_warmup", "optimizer",
        "average_tokens_across_devices", "use_mca", "use_megatron_bridge", "expert_tensor_parallel_size", "ray_*",
        "master_addr", "master_port",
    ),
    "the model comes from a folder or the local hub cache, and no code of its own is run": (
        "trust_remote_code", "cache_dir", "use_fast_tokenizer", "*_hub_token", "offload_folder",
    ),
    "a validation reads the whole of each set, as training reads it": (
        "do_eval", "per_device_eval_batch_size", "eval_accumulation_steps", "eval_on_start", "eval_delay",
        "eval_on_each_dataset", "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics",
        "bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "batch_eval_metrics", "greater_is_better",
    ),
    "nothing is generated during training": (
        "predict_with_generate", "generation_*", "do_predict", "do_sample", "temperature", "top_p", "top_k",
        "num_beams", "max_length", "max_new_tokens", "repetition_penalty", "length_penalty", "skip_special_tokens",
        "eval_num_beams", "infer_*", "vllm_*", "sglang_*",
    ),
    "belong to other stages than sft": (
        "pref_*", "dpo_*", "kto_*", "ppo_*", "simpo_*", "ref_model*", "reward_model*", "ld_alpha",
    ),
    "only text is learned from": (
        "image_*", "video_*", "audio_*", "use_audio_in_video", "crop_to_patches", "freeze_vision_tower",
        "freeze_multi_modal_projector", "freeze_language_model",
    ),
}  # fmt: skip

# These would change the run if they are on.
LOST = {
    "use_eaft_loss": "of the objectives here it is none; one of your own can weigh by entropy: see examples/objectives",
    "use_asft_loss": "it needs a second model to compare with, which there is not",
    "asft_alpha": "belongs to use_asft_loss",
    "eaft_alpha": "belongs to use_eaft_loss",
    "quantization_bit": "adapters are trained on the weights as they are: 2 bytes a parameter over tensor x pipeline",
    "quantization_*": "belongs to quantization_bit",
    "double_quantization": "belongs to quantization_bit",
    "use_dora": "adapters are plain LoRA",
    "pissa_*": "adapters are plain LoRA, and start by changing nothing",
    "loraplus_*": "there is one learning rate",
    "additional_target": "adapters alone are trained",
    "use_llama_pro": "there are no expanded blocks",
    "freeze_trainable_layers": "belongs to another finetuning_type",
    "freeze_trainable_modules": "belongs to another finetuning_type",
    "freeze_extra_modules": "belongs to another finetuning_type",
    "use_galore": "the optimizer is AdamW",
    "galore_*": "belongs to use_galore",
    "use_apollo": "the optimizer is AdamW",
    "apollo_*": "belongs to use_apollo",
    "use_badam": "the optimizer is AdamW",
    "badam_*": "belongs to use_badam",
    "use_adam_mini": "the optimizer is AdamW",
    "use_muon": "the optimizer is AdamW",
    "optim_*": "belongs to optim",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "label_smoothing_factor": "exp(-loss) would no longer be the label's probability, of which the weights are made",
    "disable_shuffling": "each epoch is shuffled, from train.seed",
    "data_seed": "one seed, train.seed, is of both the weights and the order",
    "early_stopping_steps": "a run does all its steps; train.keep_best keeps the best checkpoint",
    "resume_from_checkpoint": "a run goes on from its own checkpoints; an exported model can be its `model`",
    "fp8*": "there are bf16 and fp32 here",
    "rope_scaling": "set it in the model's config.json",
    "model_revision": "is not asked for: name the folder of that revision as `model`",
    "shift_attn": "attention is whole",
    "mixture_of_depths": "every token goes through every layer",
    "moe_*": "there are no mixtures of experts here",
    "mtp_num_layers": "no multi-token prediction is trained",
    "resize_vocab": "the tokenizer is the model's own",
    "add_tokens": "the tokenizer is the model's own: add them to the model's folder",
    "add_special_tokens": "the tokenizer is the model's own: add them to the model's folder",
    "new_special_tokens_config": "the tokenizer is the model's own: add them to the model's folder",
    "init_special_tokens": "belongs to add_special_tokens",
    "tool_format": "tools are written as the model's chat template has it",
    "default_system": "write the system message into the data",
    "enable_thinking": "the chat template decides; a row's chat_template_kwargs can say it",
    "preserve_thinking": "the chat template decides; a row's chat_template_kwargs can say it",
    "interleave_probs": "belongs to mix_strategy",
    "tokenized_path": "the data are tokenised anew",
    "dataloader_drop_last": "no sample is dropped",
    "megatron_pretrained_checkpoint": "weights come from `model`",
    "extra_config": "carry each of its settings over by hand, under `megatron`",
    "additional_configs": "carry each of its settings over by hand, under `megatron`",
    "adapter_folder": "name the adapter's own folder",
    "use_kt": "weights stay on the GPUs",
    "kt_*": "belongs to use_kt",
    "use_hyper_parallel": "the layout is Megatron's: see `parallel`",
    "hyper_parallel_args": "the layout is Megatron's: see `parallel`",
    "parallelism_config": "the layout is Megatron's: see `parallel`",
    "oft_*": "belongs to another finetuning_type",
    "module_dropout": "belongs to another finetuning_type",
    "ddp_average_in_collective": "it would divide the gradient before the exact divisor does",
}

_OFF = {None, False, "", "no", "none", "main", "concat"}
"""Values that turn off a field of LOST."""


def carry(to: Conversion) -> None:
    """Record every unread field: in NOT_NEEDED by reason, otherwise as lost unless its value turns it off."""
    config = to.config
    left = [name for name in config.names if name not in config.asked]
    for name in left:
        if why := _find(LOST, name):
            if not _off(config.raw(name)):
                to.lose(name, why)
        elif reason := _reason(name):
            to.not_needed.setdefault(reason, []).append(name)
        else:
            to.lose(
                name, f"is none of the fields of LLaMA-Factory's SFT that are known here{_hint(name, config.asked)}"
            )


def _find(table: dict[str, str], name: str) -> str | None:
    if name in table:
        return table[name]
    return next((why for pattern, why in table.items() if "*" in pattern and fnmatchcase(name, pattern)), None)


def _off(value: Any) -> bool:
    return not value if isinstance(value, list | dict) else value in _OFF


def _reason(name: str) -> str | None:
    return next((why for why, patterns in NOT_NEEDED.items() if any(fnmatchcase(name, p) for p in patterns)), None)


def _hint(name: str, asked: set[str]) -> str:
    close = difflib.get_close_matches(name, [*asked, *LOST], n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""
