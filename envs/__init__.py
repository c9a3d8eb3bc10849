"""The environments. Importing this package registers their ids with Gymnasium, by strings only."""

import gymnasium

_IDS = {"TextGen-v0": ("textgym.envs.text_gen:TextGenEnv", "textgym.envs.text_gen_vector:TextGenVectorEnv")}

for _id, (_entry_point, _vector_entry_point) in _IDS.items():
    if _id not in gymnasium.registry:  # a second import (a reload, a worker process) changes nothing
        # No `max_episode_steps`: the length limit is part of the MDP (`max_new_tokens`), an outer time limit is the user's own.
        gymnasium.register(_id, entry_point=_entry_point, vector_entry_point=_vector_entry_point)
