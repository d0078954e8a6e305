"""Running a model that does not fit, at the throughput the machine allows (FlexGen; Sheng et al., 2023).

Weights, KV cache and computation are spread over device, host and disk by a policy that is solved for, and many
prompts share every load of a layer (the zig-zag block schedule).
"""
