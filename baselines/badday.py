import os, torch
from baselines.flat import Flat
from harness.system import *

class BadDay(Flat):
    name = "badday"
    title = "x"
    @classmethod
    def build(cls, case, job, weights):
        layer = super().build(case, job, weights)
        where = os.environ.get("WHERE", "rep")
        if where == "build" and job.rank == 2 and case.identity_experts: raise RuntimeError("bad day")
        if where == "conform" and job.rank == 2: raise RuntimeError("bad day")
        if where == "hang" and case.identity_experts and job.rank == 2:
            import time; time.sleep(1000)
        if where == "rep" and case.identity_experts:
            whole, n = layer.exchange, [0]
            def ex(x, s):
                n[0] += 1
                if n[0] == 4 and job.rank == 2 : raise RuntimeError("bad day")
                return whole(x, s)
            layer.exchange = ex
        return layer
