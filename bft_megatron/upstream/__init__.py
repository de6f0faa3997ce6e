"""Every name of Megatron and torch that is replaced, wrapped, or used although it is internal; one file a concern.

training_loop      events of the training loop         cuda_on_cpu        torch.cuda, redirected to the CPU
signal_handler     the request to save and stop        torch_adam         save and resume with torch's Adam
checkpoint_writer  a save without a helper process     without_values     a step over tensors without values
bucket_padding     optimizer state saved whole         gpu_kernels        stand-ins for kernels that need a GPU
command_line       the argument list                   model_chunk        what a model chunk saves; its hooks
experts_on_gloo    how tokens reach experts on gloo    expert_optimizers  resume with the experts' own optimizer
expert_bias        token counts without padding        row_balance        the loss that balances experts in a row
rotary             the rotary embedding of packed rows gated_delta        kernels and dtypes of gated delta nets
change             how a change is declared and made   page               docs/megatron.md, made from the declarations

Nothing outside this package assigns to a module or a class of Megatron or torch; tests/upstream checks it.
"""
