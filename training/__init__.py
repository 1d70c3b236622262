"""Masked pretraining of the encoders: from a folder of audio to weights that `load_model` takes.

Run from a checkout; not part of the installed package. Read in this order:

    prepare, shards   audio -> shards of log-mel, and reading them at random
    data              crops of records, in an order that is a function of the seed alone
    masking           which patches are masked
    objectives        the pretraining models and their loss
    config            what a run is: dataclass, YAML files in configs/, overrides
    checkpoints       saving and resuming a run
    pretrain          the command that trains
    export            from a run to config.json + model.safetensors
"""
