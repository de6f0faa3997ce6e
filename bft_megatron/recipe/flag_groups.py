"""Groups of the flags of Megatron 0.19.2 that no recipe field sets: refused with a reason, or passed on.

Names are `fnmatch` patterns, so that one pattern such as `moe-*` covers a family. `flags` looks them up.
"""

from __future__ import annotations

REFUSED = {
    # Model and weights.
    "the architecture is the model's own, from its config.json": """
        num-layers encoder-num-layers decoder-num-layers hidden-size ffn-hidden-size num-attention-heads
        num-query-groups group-query-attention kv-channels normalization norm-epsilon apply-layernorm-1p
        apply-residual-connection-post-layernorm apply-query-key-layer-scaling position-embedding-type
        no-position-embedding use-rotary-position-embeddings rotary-base rotary-percent rotary-interleaved
        rotary-seq-len-interpolation-factor rope-type use-rope-scaling rope-scaling-factor no-rope-freq yarn-*
        no-yarn-* mrope-section relative-attention-* max-position-embeddings window-size window-attn-skip-freq
        vocab-size padded-vocab-size no-pad-vocab-size swiglu squared-relu quick-geglu openai-gelu glu-linear-offset
        activation-func-clamp-value disable-bias-linear add-qkv-bias qk-layernorm qk-l2-norm softmax-type
        attention-output-gate untie-embeddings-and-output-weights heterogeneous-layers-config-* use-mup mup-*
        multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim
        rotary-scaling-factor mscale mscale-all-dim cache-mla-latents mla-down-proj-fusion
        experimental-attention-variant dsa-* no-dsa-* linear-* num-experts moe-layer-freq moe-ffn-hidden-size
        moe-router-topk moe-router-topk-scaling-factor moe-router-pre-softmax moe-router-score-function
        moe-router-num-groups moe-router-group-topk moe-router-enable-expert-bias moe-shared-expert-gate
        moe-shared-expert-intermediate-size moe-latent-size moe-use-upcycling moe-upcycling-granularity""",
    "the weights come from the model's folder, or are drawn where the recipe has `init: random`": """
        no-initialization init-method-* embedding-init-method-std init-model-with-meta-device
        data-parallel-random-init""",
    "which tokens are dropped would depend on the layout": """
        moe-expert-capacity-factor moe-expert-rank-capacity-factor moe-pad-expert-* moe-pad-experts-*
        moe-token-drop-policy""",
    "it ends the run where a rank's experts get more tokens than its buffer holds": "moe-ncclep-*",
    "it sends tokens to other experts than the model does": """
        moe-router-force-* moe-input-jitter-eps moe-enable-routing-replay moe-router-padding-for-*
        moe-router-quantile-balancing-ema""",
    "it was not tried with experts": """
        moe-single-grouped-* moe-*-glu-interleave-size use-grouped-gemm-for-shared-expert moe-paged-stash*
        moe-apply-probs-on-input expert-tensor-parallel-num-weight-shards use-fused-weighted-squared-relu
        overlap-moe-expert-parallel-comm overlap-dispatch-backward-with-experts-wgrad
        ep-overlap-early-attn-memory-release delay-wgrad-compute""",
    "the router computes in fp32: rounding would choose the experts": "moe-router-dtype",
    "it moves the experts' bias by counts that include padding, and no gradient: moe.balance does without": """
        moe-router-bias-update-rate""",
    "models of this kind are not trained here": """
        is-hybrid-model hybrid-layer-pattern hybrid-override-pattern mamba-* disable-mamba-mem-eff-path
        bert-* output-bert-embeddings onnx-safe ict-* biencoder-* titles-data-path query-in-block-prob
        use-one-sent-docs evidence-data-path retriever-* block-data-path embedding-path indexer-* num-classes img-h
        img-w num-channels patch-dim classes-fraction data-per-class-fraction no-data-sharding head-lr-mult vision-*
        swin-backbone-type mask-type mask-factor iter-per-epoch dino-*""",
    # Objective, data and schedule.
    "the loss is the objective's, and so is its head (objective.head)": """
        mtp-* cross-entropy-* fp16-lm-cross-entropy fp8-output-proj defer-embedding-wgrad-compute
        wgrad-deferral-limit logits-*""",
    "the data are the recipe's own: its sources, their order and their masks": """
        data-path split train-data-path valid-data-path test-data-path data-args-path per-split-data-args-path
        per-dataset-sequences-path dataloader-fast-cache-load
        dataloader-defer-npy-index-mmap dataloader-inter-document-masking data-cache-path no-mmap-bin-files mock-data
        sample-rate mask-prob short-seq-prob reset-position-ids reset-attention-mask eod-mask-loss
        num-dataset-builder-threads object-storage-cache-path mid-level-dataset-surplus allow-ambiguous-pad-tokens
        fim-* phase-transition-iterations iterations-to-skip result-rejected-tracker-filename encoder-seq-length
        decoder-seq-length""",
    "the data order is exact only with the default": "dataloader-type",
    "the data bring their own token ids": """
        tokenizer-* no-tokenizer-* vocab-file merge-file vocab-extra-ids tiktoken-* trust-remote-code
        null-tokenizer-* sft-tokenizer-prompt-format chat-template""",
    "context parallelism cuts every row into the same chunks": "hybrid-context-parallel max-seqlen-per-dp-cp-rank",
    "a captured graph would replay the sample boundaries of the rows that it was captured with": """
        enable-cuda-graph external-cuda-graph cuda-graph-* delay-offload-until-cuda-graph""",
    "it makes validation a mean of means": "sft",
    "it crashes in Megatron 0.19.2; the whole validation set is read anyway": "full-validation",
    "every validation reads the whole of data.valid, once": """
        eval-micro-batch-size multiple-validation-sets validation-set-names start-eval-at-iter skip-train test-mode""",
    "every step takes train.global_batch_size rows": """
        rampup-batch-size step-batch-size-schedule decrease-batch-size-if-needed""",
    "a run counts steps, not samples": "lr-decay-samples lr-warmup-samples lr-wsd-decay-samples",
    # The training step.
    "the optimizer is AdamW": "sgd-momentum muon-* lion-* qk-clip* no-use-layer-wise-param-layout",
    "it divides the gradient before the exact divisor does": "ddp-average-in-collective",
    "the exact divisor, the checkpoints and the export are those of Megatron's distributed optimizer": """
        use-megatron-fsdp use-torch-fsdp2 torch-fsdp2-* fsdp-* megatron-fsdp-* data-parallel-sharding-strategy
        outer-dp-sharding-strategy no-gradient-reduce-div-fusion suggested-communication-unit-size
        keep-fp8-transpose-cache enable-full-sharding-in-hsdp no-strict-fsdp-dtensor-load
        tensor-parallel-num-weight-shards""",
    "the optimizer would begin with the weights from before the model's are read, and write them back over those": """
        fp8-param-gather fp4-param-gather reuse-grad-buf-for-mxfp8-param-ag""",
    "it disables the distributed optimizer": "freeze-all-layers",
    "the skipping of steps whose gradient is not finite depends on it": """
        initial-loss-scale min-loss-scale loss-scale-window hysteresis optimizer-cuda-graph""",
    "a rerun would count a step's reports twice": "check-for-spiky-loss check-for-large-grads error-injection-*",
    "it breaks a run on purpose": "fault-injector-*",
    "the layer spec is chosen by the device": "spec transformer-impl distributed-backend",
    "it replaces modules of the layers, and was not tried": """
        use-te-activation-func use-transformer-engine-op-fuser use-kitchen-attention kitchen-attention-backend
        use-grouped-gemm-for-dense-mlp""",
    "it is set where it is right": "use-cpu-initialization",
    # Checkpoints, start and end of a run.
    "a run resumes from its newest intact checkpoint with all of its state, and begins from the recipe's model": """
        finetune pretrained-checkpoint ckpt-step use-checkpoint-args use-mp-args-from-checkpoint-args
        no-use-tokenizer-model-from-checkpoint-args exit-on-missing-checkpoint load-main-params-from-ckpt
        override-ckpt-iteration no-load-optim no-load-rng""",
    "a checkpoint has all of a run's state, or the run could not resume as it was": """
        no-save-optim no-save-rng dist-ckpt-strictness""",
    "a run keeps its schedule to its end": "override-opt-param-scheduler use-checkpoint-opt-param-scheduler",
    "recovery and export read persistent checkpoints in the format torch_dist, from local files": """
        auto-detect-ckpt-format ckpt-convert-* dist-ckpt-save-pre-mcore-014 non-persistent-* replication
        replication-* enable-msc""",
    "Megatron does not support it with distributed checkpoints": "overlap-param-gather-with-optimizer-step",
    "its helper processes die of the signal that asks for a save, and the run would wait for them": """
        async-save async-strategy async-ckpt-* use-persistent-ckpt-worker dist-ckpt-workers""",
    "SIGUSR1, SIGTERM, SIGINT and SIGHUP are all answered": """
        exit-signal exit-signal-handler-for-training exit-signal-handler-for-dataloader""",
    "status 0 would say that the run is done": "exit-interval adlr-autoresume adlr-autoresume-interval",
    "the launcher starts a run again as a whole": """
        inprocess-* enable-ft-package calc-ft-timeouts ft-num-warmup-iters""",
    "the ranks are started and joined before Megatron is": "local-rank lazy-mpu-init fake-process-group",
    "it replaces every other flag": "yaml-cfg",
    "it prints Megatron's flags and exits": "help",
    "a run learns from given answers": "perform-rl-step rl-* grpo-* langrl-env-config refit-method",
    "it is for inference": """
        inference-* max-tokens-to-oom use-legacy-static-engine decode-only-cuda-graphs enable-chunked-prefill
        num-speculative-tokens use-same-sampling-seed-across-dp-ranks flash-decode symmetric-ar-type
        nccl-all-reduce-for-prefill mlp-chunks-for-prefill""",
    "Megatron 0.19.2 no longer takes it": "batch-size warmup model-parallel-size checkpoint-activations",
}
"""Reason -> flags that are refused for it."""

REFUSED_VALUES = {
    "attention-backend": {"local": "it knows no packed rows"},
    "moe-flex-dispatcher-backend": {
        "ncclep": "it ends the run where a rank's experts get more tokens than its buffer holds"
    },
    "ckpt-format": dict.fromkeys(
        ("torch", "torch_dcp", "fsdp_dtensor"), "recovery, export and resuming read the format torch_dist"
    ),
    "moe-router-load-balancing-type": {
        "aux_loss": "it balances each micro-batch, so its gradient depends on train.micro_batch_size (12 % off at 2 "
        "rows, 19 % at 4); moe.balance balances each row",
        "global_aux_loss": "it averages over the micro-batches so far and divides by the data-parallel size (on 2 "
        "ranks its gradient is half of that on 1); moe.balance is the same on every layout",
        "sinkhorn": "it sends tokens to other experts in training than the model does",
        "quantile_balancing": "it sends tokens to other experts than the model does",
    },
}
"""Flag -> value that is refused -> reason. Other values of these flags are passed on, or belong to a field."""

NOT_MEGATRONS = {"label-smoothing": "exp(-loss) would no longer be the probability of the label"}
"""Flag of other trainers that Megatron does not have -> reason for refusing it."""

MAY_CHANGE = {
    "activations that are computed again or offloaded": """
        recompute-granularity recompute-method recompute-num-layers recompute-modules recompute-activations
        moe-layer-recompute
        distribute-saved-activations cpu-offloading-num-layers cpu-offloading-retain-pinned-cpu-buffers
        fine-grained-activation-offloading fine-grained-offloading-max-inflight-offloads offload-modules
        min-offloaded-tensor-size delta-offload-bytes-across-pp-ranks activation-offload-fraction
        mlp-chunks-for-training empty-unused-memory-level""",
    "layout": """
        account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split decoder-first-pipeline-num-layers
        decoder-last-pipeline-num-layers pipeline-model-parallel-layout use-tp-pp-dp-mapping cp-comm-type
        hierarchical-context-parallel-sizes microbatch-group-size-per-virtual-pipeline-stage""",
    "communication": """
        overlap-grad-reduce overlap-param-gather overlap-p2p-communication-warmup-flush no-overlap-p2p-communication
        no-align-grad-reduce no-align-param-gather ddp-num-buckets ddp-bucket-size ddp-pad-buckets-for-high-nccl-busbw
        create-all-gather-group tp-comm-* no-tp-comm-* use-ring-exchange-p2p pipeline-model-parallel-comm-backend
        nccl-communicator-config-path use-nccl-ub disable-symmetric-registration use-sharp sharp-enabled-group
        high-priority-stream-groups disable-gloo-process-groups high-priority-a2a-comm-stream moe-token-dispatcher-type
        moe-flex-dispatcher-* moe-enable-deepep moe-deepep-num-sms moe-hybridep-*
        moe-permute-fusion-into-hybridep moe-shared-expert-overlap""",
    "time-outs and watching": """
        distributed-timeout-minutes distributed-timeout-seconds-after-init flight-recorder-* no-flight-recorder-*
        check-weight-hash-across-dp-replicas-interval gpu-sniff-test-interval train-sync-interval""",
    "kernels": """
        attention-backend flash-attention-version use-flash-attn no-persist-layer-norm no-masked-softmax-fusion
        no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion no-gradient-accumulation-fusion
        fused-residual-rmsnorm disable-jit-fuser moe-grouped-gemm moe-permute-fusion moe-router-fusion
        deterministic-mode no-clone-scatter-output-in-embedding""",
    "processes and memory of the host": """
        num-workers manual-gc manual-gc-interval no-manual-gc-eval
        no-pin-cpu-grads no-pin-cpu-params overlap-cpu-optimizer-d2h-h2d""",
    "saving and loading": """
        ckpt-format ckpt-fully-parallel-load ckpt-fully-parallel-load-* no-ckpt-fully-parallel-save
        ckpt-fully-parallel-save-process-group ckpt-assume-constant-structure
        no-ckpt-load-validate-sharding-integrity no-stream-ckpt-dequant dist-ckpt-optim-fully-reshardable
        distrib-optim-fully-reshardable-mem-efficient save-params-interval save-activations-interval
        save-wgrads-interval save-dgrads-interval dump-param-to-param-group-map""",
    "logs": """
        moe-per-layer-logging moe-routing-trace-* save-tokens-per-expert-interval
        log-* no-log-* timing-log-level timing-log-option no-barrier-with-level-1-timing logging-level
        config-logger-dir tensorboard-log-interval tensorboard-queue-size wandb-* straggler-*
        disable-straggler-on-startup no-one-logger one-logger-* app-tag-run-*""",
    "profiles": """
        profile profile-* use-pytorch-profiler pytorch-profiler-* record-memory-history memory-snapshot-path
        record-shapes nvtx-ranges run-workload-inspector-server""",
    "without effect in Megatron 0.19.2": """
        use-mcore-models use-dist-ckpt dist-ckpt-format ckpt-fully-parallel-save disable-msc""",
}
"""Subject -> flags that are passed on and may change when a run resumes. They affect its numbers by no more than
rounding."""

MAY_NOT_CHANGE = {
    "precision": """
        grad-reduce-in-bf16 accumulate-allreduce-grads-in-fp32 ddp-reduce-scatter-with-fp32-accumulation
        ddp-param-name-patterns-for-fp32-local-accumulation attention-softmax-in-fp32 fp32-residual-connection
        disable-bf16-reduced-precision-matmul fp8-format fp8-recipe fp8-quantizer-factory fp8-margin fp8-interval
        fp8-amax-* no-fp8-wgrad fp4-format fp4-recipe fp4-quantizer-factory first-last-layers-bf16
        num-layers-at-start-in-bf16 num-layers-at-end-in-bf16 te-precision-config-file
        batch-invariant-mode enable-experimental""",
    "schedule": """
        lr-decay-style lr-decay-iters lr-warmup-fraction lr-warmup-init lr-wsd-decay-style lr-wsd-decay-iters
        decoupled-lr decoupled-min-lr apply-wd-to-qk-layernorm no-weight-decay-cond-type""",
    "optimizer and its state": """
        use-precision-aware-optimizer main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype
        optimizer-cpu-offload optimizer-offload-fraction use-torch-optimizer-for-cpu-offload
        num-distributed-optimizer-instances""",
    "state and shape of a checkpoint": """
        verify-integrity make-vocab-size-divisible-by
        te-rng-tracker""",
}
"""Subject -> flags that are passed on and must not change when a run resumes."""
