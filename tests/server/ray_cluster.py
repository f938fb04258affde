"""Ray Serve on loopback, for tests: the bundled model on as many replicas as stdin says.

A program: ``ray_cluster.py PORT FOLDER``. Each line of stdin is a number of replicas; a line of stdout says
when there are so many.
"""

from __future__ import annotations

import sys


def main(port: int, folder: str) -> None:
    import ray
    from ray import serve
    from ray._private import services

    from turboquant_server.deploy import build
    from turboquant_server.deploy_config import DeployConfig

    services.resolve_ip_for_localhost = lambda host: host  # it would listen on all addresses
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
        _node_ip_address="127.0.0.1",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    for line in sys.stdin:
        settings = {"device": "cpu", "kv_cache_memory": "256MiB", "api_key": "secret", "num_replicas": line}
        serve.run(build(DeployConfig.model_validate(settings)))
        print("replicas:", int(line), flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
