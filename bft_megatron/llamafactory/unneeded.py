"""The arguments that need no counterpart, because leaving them out changes nothing that a run learns.

Reason -> argument -> its default.
"""

from __future__ import annotations

from typing import Any

UNNEEDED: dict[str, dict[str, Any]] = {
    "every step's numbers are in metrics.jsonl and TensorBoard": {
        "logging_dir": None, "logging_strategy": "steps", "logging_first_step": False, "logging_nan_inf_filter": True,
        "plot_loss": False, "disable_tqdm": None, "debug": "", "log_level": "passive", "log_level_replica": "warning",
        "log_on_each_node": True, "compute_accuracy": False, "include_effective_tokens_per_second": False,
        "include_num_input_tokens_seen": "no", "include_tokens_per_second": False, "print_param_status": False,
        "skip_memory_metrics": True, "enable_torch_profiler": False, "profiler_output_dir": None,
        "profiler_wait_steps": 1, "profiler_warmup_steps": 1, "profiler_active_steps": 1, "profiler_repeat": 1,
        "profiler_record_shapes": True, "profiler_profile_memory": True, "profiler_with_stack": True,
        "profile_modules": None, "tpu_metrics_debug": False,
    },
    "the data are prepared once, beforehand": {
        "preprocessing_batch_size": 1000, "preprocessing_num_workers": None, "overwrite_cache": False,
        "dataloader_num_workers": 0, "dataloader_pin_memory": True, "dataloader_persistent_workers": False,
        "dataloader_prefetch_factor": None, "dataloader_multiprocessing_context": None, "dataloader_in_order": True,
        "streaming": False, "buffer_size": 16384, "data_shared_file_system": False, "ignore_pad_token_for_loss": True,
        "remove_unused_columns": True, "label_names": None, "length_column_name": "length", "dispatch_batches": None,
        "split_batches": None,
    },
    "a control token that a text spells out stays text": {"split_special_tokens": False},
    "the same command goes on where a run stopped, from whole checkpoints": {
        "overwrite_output_dir": False, "save_only_model": False, "save_safetensors": True, "save_on_each_node": False,
        "ignore_data_skip": False, "restore_callback_states_from_checkpoint": False, "enable_jit_checkpoint": False,
        "ckpt_format": "legacy", "ckpt_d2h_non_blocking": False, "distrib_optim_fully_reshardable": False,
        "distrib_optim_fully_reshardable_mem_efficient": False, "past_index": -1,
    },
    "`bft-megatron export` writes the Hugging Face model": {
        "export_dir": None, "export_size": 5, "export_device": "cpu", "export_quantization_bit": None,
        "export_quantization_dataset": None, "export_quantization_nsamples": 128, "export_quantization_maxlen": 1024,
        "export_legacy_format": False, "export_hub_model_id": None, "export_hf_on_finish": False,
        "save_hf_model": False, "save_merged_model": False, "push_to_hub": False, "hub_token": None,
        "hub_private_repo": None, "hub_model_id": None, "hub_strategy": "every_save", "hub_always_push": False,
        "hub_revision": None, "push_to_hub_model_id": None, "push_to_hub_organization": None,
        "push_to_hub_token": None,
    },
    "layers, kernels and communication are Megatron's": {
        "flash_attn": "auto", "enable_liger_kernel": False, "use_liger_kernel": False, "liger_kernel_config": None,
        "use_unsloth": False, "use_unsloth_gc": False, "use_v1_kernels": False, "torch_compile": False,
        "torch_compile_backend": None, "torch_compile_mode": None, "torchdynamo": None, "use_reentrant_gc": True,
        "gradient_checkpointing": None, "gradient_checkpointing_kwargs": None, "activation_checkpointing": None,
        "activation_checkpointing_kwargs": None, "low_cpu_mem_usage": True, "upcast_layernorm": False,
        "upcast_lmhead_output": False, "use_cache": False, "use_kv_cache": True, "tf32": None, "fp16_backend": "auto",
        "fp16_opt_level": "O1", "half_precision_backend": "auto", "jit_mode_eval": False, "use_ipex": False,
        "use_mps_device": False, "no_cuda": False, "mp_parameters": "", "tpu_num_cores": None,
        "ddp_find_unused_parameters": None, "ddp_bucket_cap_mb": None, "ddp_broadcast_buffers": None,
        "ddp_static_graph": None, "ddp_backend": None, "ddp_timeout": 1800, "ddp_bucket_size": None,
        "fsdp_config": None, "fsdp_min_num_params": 0, "fsdp_transformer_layer_cls_to_wrap": None,
        "accelerator_config": None, "torch_empty_cache_steps": None, "local_rank": -1,
        "bias_activation_fusion": None, "apply_rope_fusion": None, "masked_softmax_fusion": None,
        "cross_entropy_loss_fusion": None, "use_distributed_optimizer": True, "calculate_per_token_loss": None,
        "variable_seq_lengths": False, "overlap_p2p_comm": True, "delay_grad_reduce": True,
        "check_for_nan_in_loss_and_grad": True, "accumulate_allreduce_grads_in_fp32": False, "transformer_impl": None,
        "cuda_graph_impl": None, "cuda_graph_scope": "full", "compile_warmup": False, "ray_init_kwargs": None,
        "ray_scope": "last", "master_addr": None, "master_port": None,
    },
    "the model comes from a folder or the local hub cache, and no code of its own is run": {
        "trust_remote_code": False, "cache_dir": None, "use_fast_tokenizer": True, "hf_hub_token": None,
        "ms_hub_token": None, "om_hub_token": None, "offload_folder": "offload",
    },
    "a validation reads the whole of each set, as training reads it": {
        "do_eval": False, "per_device_eval_batch_size": 8, "eval_accumulation_steps": None, "eval_on_start": False,
        "eval_delay": 0, "eval_on_each_dataset": False, "eval_do_concat_batches": True,
        "eval_use_gather_object": False, "include_for_metrics": None, "include_inputs_for_metrics": False,
        "bf16_full_eval": False, "fp16_full_eval": False, "prediction_loss_only": False, "batch_eval_metrics": False,
        "greater_is_better": None,
    },
    "nothing is generated during training": {
        "predict_with_generate": False, "generation_max_length": None, "generation_num_beams": None,
        "generation_config": None, "do_predict": False, "do_sample": True, "temperature": 0.95, "top_p": 0.7,
        "top_k": 50, "num_beams": 1, "max_length": 1024, "max_new_tokens": 1024, "repetition_penalty": 1.0,
        "length_penalty": 1.0, "skip_special_tokens": True, "eval_num_beams": None, "infer_backend": "huggingface",
        "infer_dtype": "auto", "vllm_maxlen": 4096, "vllm_gpu_util": 0.7, "vllm_enforce_eager": False,
        "vllm_max_lora_rank": 32, "vllm_config": None, "sglang_maxlen": 4096, "sglang_mem_fraction": 0.7,
        "sglang_tp_size": -1, "sglang_config": None, "sglang_lora_backend": "triton",
    },
    "belong to other stages than sft": {
        "pref_beta": 0.1, "pref_ftx": 0.0, "pref_bco_weight": 0.0, "pref_loss": "sigmoid", "dpo_label_smoothing": 0.0,
        "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0, "simpo_gamma": 0.5, "ppo_buffer_size": 1,
        "ppo_epochs": 4, "ppo_score_norm": False, "ppo_target": 6.0, "ppo_whiten_rewards": False, "ref_model": None,
        "ref_model_adapters": None, "ref_model_quantization_bit": None, "reward_model": None,
        "reward_model_adapters": None, "reward_model_quantization_bit": None, "reward_model_type": "lora",
        "ld_alpha": None,
    },
    "only text is learned from": {
        "media_dir": None, "image_max_pixels": 589824, "image_min_pixels": 1024, "image_do_pan_and_scan": False,
        "crop_to_patches": False, "video_max_pixels": 65536, "video_min_pixels": 256, "video_fps": 2.0,
        "video_maxlen": 128, "use_audio_in_video": False, "audio_sampling_rate": 16000, "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True, "freeze_language_model": False,
    },
}  # fmt: skip
