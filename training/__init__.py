"""Masked pretraining of the encoders, from shards of log-mel to weights that `load_model` takes.

Run from a checkout; not part of the installed package. Read in this order:

    corpora/          audio -> shards of log-mel
    config            a run's config: dataclass, YAML files in configs/, overrides
    data              crops of records, in an order that is a function of the seed alone
    masking           random masks
    objectives        the pretraining models and their loss
    optimizers        AdamW and Muon
    held_out          fixed crops to test a model on, and baselines
    flops             the FLOPs of a call, the FLOP/s of a device
    run_dir           a run's directory: config, data, log, checkpoints
    run_log, figures  progress: terminal, log.jsonl, TensorBoard, pictures
    pretrain          the command that trains
    gpu_sprint        the command that trains by the clock, from a pack that lies in a GPU's memory
    curves            the command that draws held-out errors
    export            the command that turns a run into config.json + model.safetensors
"""
