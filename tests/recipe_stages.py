"""Two stages: the second goes on from the parameters of the first, under names that do not sort."""

from ml_collections import ConfigDict

from tests import recipe_linear


def get_config(tiny=False):
    first, second = recipe_linear.get_config(), recipe_linear.get_config()
    first.steps, second.steps = 20, 30
    second.initialize = dict(type="train.restore.load_params", take={"model": "model"})
    return ConfigDict(dict(stages=dict(warm=first, cold=second)))
