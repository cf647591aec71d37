"""One rank in a network namespace: exchanges through a dispatcher, reading the interface's own byte counters.

python namespace_rank.py RANK ADDRESS DISPATCHER REPEATS
"""

import json
import os
import sys
from datetime import timedelta

from network_namespaces import INTERFACE, count_sent_bytes

rank, address, dispatcher, repeats = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
os.environ |= {"GLOO_SOCKET_IFNAME": INTERFACE, "MASTER_ADDR": address, "MASTER_PORT": "29511", "USE_LIBUV": "0"}

import torch.distributed as distributed  # noqa: E402 (reads the environment)

from hf_moe_ext.dcca.meter import TrafficMeter  # noqa: E402
from support import expert_exchange as work  # noqa: E402

distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
work.WIDTH = 512
experts = work.dispatched("batched_mm", dispatcher, 1)
case = work.build_case([96, 96])
inputs = [tensors[rank] for tensors in case]
work.forward_backward(experts, inputs)  # connections are made when first used
distributed.barrier()
before = count_sent_bytes()
with TrafficMeter() as meter:
    for _ in range(repeats):
        work.forward_backward(experts, inputs)
distributed.barrier()
after = count_sent_bytes()
print(json.dumps({"wire": after - before, "flows": meter.as_dict(), "total": meter.bytes()}))
sys.stdout.flush()
distributed.barrier()
os._exit(0)
