"""Classes for transformers' `trust_remote_code=True`. All code is in the package hear-audiomaepp."""

try:
    from hear_encoders.adapters import transformers as hear
except ImportError as error:
    raise ImportError("this model needs: pip install 'hear-audiomaepp[transformers]'") from error


# transformers copies the file of a class that it saves: this one.
class HearConfig(hear.HearConfig):
    pass


class HearModel(hear.HearModel):
    config_class = HearConfig
