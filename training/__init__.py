"""Masked pretraining of the encoders, from a folder of audio to weights that `load_model` takes, and their evaluation.

Run from a checkout; not part of the installed package. Read in this order:

    prepare, shards   audio -> shards of log-mel, and reading them at random
    data              crops of records, in an order that is a function of the seed alone
    masking           which patches are masked
    flops, objectives the pretraining models, their loss, what they cost
    config            what a run is: dataclass, YAML files in configs/, overrides
    optimizers        what turns gradients into steps
    checkpoints       saving and resuming a run
    held_out          what a model is tested on as it trains
    runlog, pictures  what a run tells about itself
    pretrain          the command that trains
    export            from a run to config.json + model.safetensors
    locks             one process at a time on a folder
    corpora/          openly licensed audio for who has none
    evaluation/       HEAR tasks through hear-eval-kit, scores and reports
"""
