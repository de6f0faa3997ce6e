"""The arguments that are listed as not carried over unless they have their default: reason -> argument -> its default.

Left out, each of them would change the run without a word.
"""

from __future__ import annotations

from typing import Any

NAMED: dict[str, dict[str, Any]] = {
    # objective
    "of the objectives here it is none; one of your own can weigh by entropy: see examples/objectives": {
        "use_eaft_loss": False,
    },
    "it needs a second model to compare with, which there is not": {"use_asft_loss": False},
    "belongs to use_asft_loss": {"asft_alpha": 0.1},
    "belongs to use_eaft_loss": {"eaft_alpha": 1.0},
    "exp(-loss) would no longer be the label's probability, of which the weights are made": {
        "label_smoothing_factor": 0.0,
    },
    "no noise is added to embeddings": {"neftune_noise_alpha": None},
    # adapters and other ways of training a part
    "dropout in the adapters would make a run depend on its layout, and lora.dropout must be 0": {"lora_dropout": 0.0},
    "adapters are trained on the weights as they are: 2 bytes a parameter over tensor x pipeline": {
        "quantization_bit": None,
    },
    "belongs to quantization_bit": {
        "quantization_method": "bnb", "quantization_type": "nf4", "double_quantization": True,
        "quantization_device_map": None,
    },
    "adapters are plain LoRA": {"use_dora": False},
    "adapters are plain LoRA, and start by changing nothing": {
        "pissa_init": False, "pissa_iter": 16, "pissa_convert": False,
    },
    "there is one learning rate": {"loraplus_lr_ratio": None, "loraplus_lr_embedding": 1e-6},
    "adapters alone are trained": {"additional_target": None},
    "name the adapter's own folder": {"adapter_folder": None},
    "there are no expanded blocks": {"use_llama_pro": False},
    "belongs to another finetuning_type": {
        "freeze_trainable_layers": 2, "freeze_trainable_modules": "all", "freeze_extra_modules": None, "oft_rank": 0,
        "oft_block_size": 32, "oft_target": "all", "module_dropout": 0.0,
    },
    # optimizer and schedule
    "the optimizer is AdamW": {
        "use_galore": False, "use_apollo": False, "use_badam": False, "use_adam_mini": False, "use_muon": False,
        "optimizer": "adam",
    },
    "belongs to use_galore": {
        "galore_target": "all", "galore_rank": 16, "galore_update_interval": 200, "galore_scale": 2.0,
        "galore_proj_type": "std", "galore_layerwise": False,
    },
    "belongs to use_apollo": {
        "apollo_target": "all", "apollo_rank": 16, "apollo_update_interval": 200, "apollo_scale": 32.0,
        "apollo_proj": "random", "apollo_proj_type": "std", "apollo_scale_type": "channel", "apollo_layerwise": False,
        "apollo_scale_front": False,
    },
    "belongs to use_badam": {
        "badam_mode": "layer", "badam_start_block": None, "badam_switch_mode": "ascending",
        "badam_switch_interval": 50, "badam_update_ratio": 0.05, "badam_mask_mode": "adjacent", "badam_verbose": 0,
    },
    "belongs to optim": {"optim_args": None, "optim_target_modules": None},
    "the batch stays as it is: lower train.micro_batch_size or data.seq_length where memory is short": {
        "auto_find_batch_size": False,
    },
    "a run does all its steps; train.keep_best keeps the best checkpoint": {"early_stopping_steps": None},
    "a run goes on from its own checkpoints; an exported model can be its `model`": {"resume_from_checkpoint": None},
    "set megatron.deterministic-mode": {"full_determinism": False},
    "there are bf16 and fp32 here": {
        "fp8": False, "fp8_backend": "auto", "fp8_enable_fsdp_float8_all_gather": False, "fp8_recipe": None,
        "fp8_param": False,
    },
    # model
    "a model is trained with the positions of its config.json: keep data.seq_length within them, or start from a "
    "model made for longer texts": {"rope_scaling": None},
    "is not asked for: name the folder of that revision as `model`": {"model_revision": "main"},
    "attention is whole": {"shift_attn": False},
    "every token goes through every layer": {"mixture_of_depths": None},
    "experts are balanced by another function, off by default, whose coefficient is moe.balance": {
        "moe_aux_loss_coef": None, "moe_aux_loss_coeff": None,
    },
    "tokens go to their experts by an all-to-all: for another way set megatron.moe-token-dispatcher-type": {
        "moe_token_dispatcher_type": "allgather",
    },
    "no token is dropped, since which one is depends on the layout": {
        "moe_expert_capacity_factor": None, "moe_pad_expert_input_to_capacity": None, "moe_token_drop_policy": None,
    },
    "experts are computed together where the GPU's libraries can: megatron.moe-grouped-gemm decides it by hand": {
        "moe_grouped_gemm": None,
    },
    "set megatron.moe-layer-recompute": {"moe_layer_recompute": False},
    "set megatron.moe-shared-expert-overlap": {"moe_shared_expert_overlap": False},
    "a token goes where the router sends it": {"moe_enable_routing_replay": False},
    "routers compute in fp32": {"moe_router_dtype": None},
    "no multi-token prediction is trained": {"mtp_num_layers": 0},
    "weights come from `model`": {"megatron_pretrained_checkpoint": None},
    "the tokenizer is the model's own": {"resize_vocab": False},
    "the tokenizer is the model's own: add them to the model's folder": {
        "add_tokens": None, "add_special_tokens": None, "new_special_tokens_config": None,
    },
    "belongs to add_special_tokens": {"init_special_tokens": "noise_init"},
    # data
    "tools are written as the chat template has it": {"tool_format": None},
    "write the system message into the data": {"default_system": None},
    "where the chat template has a variable for it, give it in data.chat_template_kwargs": {"preserve_thinking": False},
    "an epoch takes each source `weight` times, 1 here: set it in data.train": {"mix_strategy": "concat"},
    "belongs to mix_strategy": {"interleave_probs": None},
    "the data are tokenised anew": {"tokenized_path": None},
    "each epoch is shuffled, from train.seed": {
        "disable_shuffling": False, "train_sampling_strategy": "random", "group_by_length": False,
        "sortish_sampler": False,
    },
    "one seed, train.seed, is of both the weights and the order": {"data_seed": None},
    "no sample is dropped": {"dataloader_drop_last": False},
    # trackers
    "metrics.jsonl and TensorBoard have every step; for W&B set `wandb-project` under `megatron`": {
        "report_to": "none", "run_name": None, "project": "huggingface", "trackio_space_id": None,
        "trackio_bucket_id": None, "trackio_static_space_id": None, "use_swanlab": False,
        "swanlab_project": "llamafactory", "swanlab_workspace": None, "swanlab_run_name": None,
        "swanlab_mode": "cloud", "swanlab_api_key": None, "swanlab_logdir": None, "swanlab_lark_webhook_url": None,
        "swanlab_lark_secret": None,
    },
    # layout
    "carry each of its settings over by hand, under `megatron`": {"extra_config": None, "additional_configs": None},
    "weights stay on the GPUs": {"use_kt": False},
    "belongs to use_kt": {
        "kt_config": None, "kt_cpu_activation": None, "kt_weight_path": None, "kt_non_expert_weight_path": None,
        "kt_expert_checkpoint_path": None, "kt_use_lora_experts": None, "kt_lora_expert_num": None,
        "kt_lora_expert_intermediate_size": None,
    },
    "the layout is Megatron's: see `parallel`": {
        "use_hyper_parallel": False, "hyper_parallel_args": None, "parallelism_config": None,
    },
    "it would divide the gradient before the exact divisor does": {"ddp_average_in_collective": False},
}  # fmt: skip
