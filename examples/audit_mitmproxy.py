"""Tampers with responses by a plan inside mitmproxy, for traffic that a reverse proxy cannot reach.

    mitmdump -s examples/audit_mitmproxy.py --set plan=plan.toml --set allow=api.example.com

In an environment of its own: mitmproxy wants another release of ``cryptography`` than Hansa's
extras, and of Hansa it needs the core alone (``pip install --no-deps hansa lazy-loader``). Only for
applications of your own, whose trust in mitmproxy's certificate is yours to give.
"""

import json
from datetime import UTC, datetime

from mitmproxy import ctx, http

from hansa.audit.inplace import edited
from hansa.audit.paths import written
from hansa.audit.plan import Plan, read_plan
from hansa.audit.tamper import decoded, digest
from hansa.errors import InputError


class Tamper:
    """Edits the responses of listed hosts, and prints a line with digests for each."""

    plan: Plan

    def load(self, loader) -> None:
        """Declare the options."""
        loader.add_option("plan", str, "plan.toml", "What to edit.")
        loader.add_option("allow", str, "", "Hosts whose responses may be edited, by commas.")

    def configure(self, updated) -> None:
        """Read the plan; what is wrong with it ends mitmdump."""
        if "plan" in updated:
            self.plan = read_plan(ctx.options.plan)

    def response(self, flow: http.HTTPFlow) -> None:
        """Edit one response; mitmproxy undoes its encoding, does it again, and sets its length."""
        route, response = flow.request.path.partition("?")[0], flow.response
        is_listed = flow.request.pretty_host in ctx.options.allow.split(",")
        if not is_listed or not self.plan.touches(route) or response.status_code != 200:
            return
        line = {"time": datetime.now(UTC).isoformat(), "route": route, "seed": self.plan.seed}
        try:
            body = response.content or b""
            made = self.plan.apply(decoded(body), route, digest(body))
            response.content = edited(body, made.edits)
            places = [{"operator": e.operator, "path": written(e.path)} for e in made.edits]
            after = digest(response.content)
            line |= {"edits": places, "before": digest(body), "after": after}
        except (InputError, ValueError) as error:
            key = getattr(error, "key", "")
            line["passed"] = str(error.found) if key == "path" else "not what a rule can edit"
        print(json.dumps(line), flush=True)


addons = [Tamper()]
