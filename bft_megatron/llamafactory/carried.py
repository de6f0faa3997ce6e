"""The arguments that are carried over: concern, which is a module of `llamafactory` -> argument -> its default."""

from __future__ import annotations

from typing import Any

CARRIED: dict[str, dict[str, Any]] = {
    # `do_train` and `finetuning_type` only say that the config is one that can be carried over.
    "convert": {"stage": "sft", "do_train": True, "finetuning_type": "lora", "ray_num_workers": 1},
    "model": {
        "model_name_or_path": None, "output_dir": None, "train_from_scratch": False, "use_cpu": False,
        "lora_rank": 8, "lora_alpha": None, "lora_target": "all", "use_rslora": False, "adapter_name_or_path": None,
        "create_new_adapter": False,
    },
    "template": {"template": None, "enable_thinking": True},
    "data": {
        "dataset": None, "eval_dataset": None, "dataset_dir": "data", "max_samples": None, "val_size": 0.0,
        "cutoff_len": 2048, "packing": None, "neat_packing": False, "use_packed_sequences": False,
        "sequence_packing": False, "train_on_prompt": False, "mask_history": False,
    },
    "objective": {"use_bft_loss": False, "use_dft_loss": False, "average_tokens_across_devices": True},
    "parallelism": {
        "use_mca": False, "use_megatron_bridge": False, "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None, "context_parallel_size": 1,
        "expert_model_parallel_size": 1, "expert_tensor_parallel_size": None, "hyper_parallel_cp_size": 1,
        "sequence_parallel": False, "account_for_embedding_in_pipeline_split": None,
        "account_for_loss_in_pipeline_split": None, "pipeline_model_parallel_layout": None,
        "overlap_param_gather": False, "overlap_grad_reduce": False, "optimizer_cpu_offload": False,
        "optimizer_offload_fraction": 0.0, "recompute_granularity": None, "recompute_method": None,
        "recompute_num_layers": None, "recompute_modules": None, "disable_gradient_checkpointing": False,
        "deepspeed": None, "fsdp": None, "bf16": False, "fp16": False, "pure_bf16": False,
        "mixed_precision": "bf16_mixed",
    },
    "training": {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": -1, "num_train_epochs": 3.0,
        "learning_rate": 5e-5, "lr_scheduler_type": "linear", "lr_scheduler_kwargs": None, "warmup_steps": 0,
        "warmup_ratio": 0.0, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
        "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "seed": 42,
    },
    "saving": {
        "save_strategy": "steps", "save_steps": 500, "save_total_limit": None, "eval_strategy": "no",
        "evaluation_strategy": "no", "eval_steps": None, "load_best_model_at_end": False,
        "metric_for_best_model": None, "logging_steps": 500,
    },
}  # fmt: skip
