"""A script that several processes run together, or one alone.

Two on one machine: COORDINATOR=localhost:1234 PROCESSES=2 PROCESS=0 python several_processes.py, and with PROCESS=1.
"""

import os

import qspec_jax

who = {}  # on SLURM, GKE and TPU pods: {"coordinator": "auto"}
if "COORDINATOR" in os.environ:
    who["coordinator"] = os.environ["COORDINATOR"]
    who |= {"num_processes": int(os.environ["PROCESSES"]), "process_id": int(os.environ["PROCESS"])}
with qspec_jax.join(**who) as processes:
    model = qspec_jax.load(mesh=f"data={processes.count}")  # in all of them: each loads its share
    if processes.leads:  # in process 0 alone; the others do what it needs, at the end of the block
        results = model.generate(["Name three fruits.", "Name three colours."], max_new_tokens=64)
        for result in results:
            print(result.text)
