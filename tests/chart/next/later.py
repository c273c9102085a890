"""The operator as a later version might be: it renders every pod with another probe and one more label."""

from __future__ import annotations

import sys
from typing import Any

from moe_operator.__main__ import main
from moe_operator.render import frontend, worker


def later(render: Any) -> Any:
    """What renders templates a little differently."""

    def rendered(deployment: Any) -> dict[str, Any]:
        template = render(deployment)
        for container in template["spec"]["containers"]:
            container["livenessProbe"] = {**container["livenessProbe"], "failureThreshold": 7}
        template["metadata"] = {"labels": {**template["metadata"]["labels"], "rendered-by": "later"}}
        return template

    return rendered


worker.rendered, frontend.rendered = later(worker.rendered), later(frontend.rendered)

if __name__ == "__main__":
    # After the functions are replaced: the table of carriers holds them.
    del sys.argv[1:3]  # -m moe_operator
    main()
