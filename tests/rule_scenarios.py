"""Random lives of a job: what may happen to any rule, played to a real aggregator and told to its oracle."""

from hypothesis import strategies as st

from shared.errors import StoreUnavailable
from shared.rules import AVERAGING
from shared.rules import RULES as SPECS
from tests.builders import FaultyStore, System, weights
from tests.rule_oracles import STALENESS, Oracle

OPTIMIZERS = ["sgd", "sgd", "momentum(0.7)", "adagrad(0.1)", "adam(0.8,0.95,0.1)", "yogi(0.8,0.95,0.1)"]
SETTINGS = {
    "server_lr": st.sampled_from([1.0, 0.3]),
    "server_optimizer": st.sampled_from(OPTIMIZERS),
    "buffer_size": st.integers(1, 4),
    "weight_by_samples": st.booleans(),
    "staleness": st.sampled_from(sorted(STALENESS)),
    "staleness_max": st.sampled_from([0, 1, 3, 100, 100]),
    "clients": st.sampled_from([2, 3, 4, 9]),
    "alpha": st.sampled_from([0.1, 0.6, 1.0]),
}
VARIANTS = {
    "fednova": ["fednova", "fednova(3)", "fednova(0,0.9)", "fednova(2.5,0,0.2)"],
    "rescaled": ["rescaled", "rescaled(1,2)", "rescaled(0.5,100)"],
    "fadas": ["fadas(1,0.9,0.99,0.1)", "fadas(0,0,0.9,0.1)", "fadas(3,0.5,0.5,0.001)"],
    "aced": ["aced", "aced(2)", "aced(5)", "aced(100)"],
}
LOOP = {"commit_interval_s": st.sampled_from([0.0, 0.5]), "prefetch": st.sampled_from([1, 2, 8, 256])}


def settings_of(rule):
    """Draw settings that mean something to a rule."""
    used = {name: SETTINGS[name] for name in SPECS[rule].uses if name in SETTINGS}
    slots = rule in AVERAGING and rule != "fedavg"  # whose rounds are of one update a client anyway
    if "robust" in SPECS[rule].uses and rule != "fedasync":  # whose alpha guards lower: another formula
        used["robust"] = st.sampled_from(["", "norm(2.5)", *(["", "one_slot", "throttle(2)"] * slots)])
    if {"buffer_size", "clients"} <= used.keys():
        used |= {"buffer_size": st.integers(1, 3), "clients": st.sampled_from([3, 4, 9])}
    used["staleness_max"] = st.just(0) if rule == "fedavg" else SETTINGS["staleness_max"]
    drawn = st.fixed_dictionaries(used | LOOP | {"rule": st.sampled_from(VARIANTS.get(rule, [rule]))})
    return drawn.map(_without_liars)


def _without_liars(drawn):
    """Behind a defence FedNova does not take the clients' word for their steps."""
    own = drawn["rule"].startswith("fednova") and drawn["rule"] in ("fednova", "fednova(0,0.9)")
    return drawn | {"robust": ""} if own else drawn


CLIENTS = st.sampled_from("aaabbbcccde")  # some send more often; more of them than some settings' clients
STEPS = st.sampled_from([1, 1, 1, 1, 2, 7])
ACTIONS = st.one_of(
    st.tuples(st.just("publish"), CLIENTS, st.integers(0, 6), st.integers(1, 40), STEPS),  # versions behind, samples
    st.tuples(st.just("publish"), CLIENTS, st.integers(0, 1), st.integers(1, 40), STEPS),
    st.tuples(st.just("publish"), CLIENTS, st.just(0), st.integers(1, 40), st.just(1)),
    st.tuples(st.just("again"), st.integers(0, 10**6)),
    st.tuples(st.just("step")),
    st.tuples(st.just("drain")),
    st.tuples(st.just("wait"), st.sampled_from([0.3, 2.0, 40.0])),
    st.tuples(st.just("kill")),
    st.tuples(st.just("stop")),
    st.tuples(st.just("blind")),
)
SCENARIOS = st.lists(ACTIONS, min_size=30, max_size=80)  # hypothesis prefers short lists: mostly about 40
FAULTS = st.lists(st.sampled_from([None, None, "before", "after"]), max_size=12)


class BlindStore(FaultyStore):
    """A store whose commits fail as told, and which at times does not find a rule's record."""

    blind = False

    def kept(self, name):
        if self.blind:
            raise StoreUnavailable("the store is away")
        return self.inner.kept(name)


def play(system: System, oracle: Oracle, scenario, codec="float32", delta_of=weights) -> None:
    """Do what the scenario says, then let everything settle."""
    sent, visible = [], [0]
    for action, *details in scenario:
        match action:
            case "publish":
                client, lag, num_samples, num_steps = details
                base = visible[max(0, len(visible) - 1 - lag)]
                fields = {"update_id": f"{client}/i/{len(sent)}", "base_version": base, "codec": codec}
                fields |= {"num_samples": num_samples, "num_steps": num_steps, "seed": len(sent)}
                sent.append(system.publish(delta_of(len(sent)), **fields))
                oracle.receive(sent[-1])
            case "again" if sent:
                system.send(sent[details[0] % len(sent)])
                oracle.receive(sent[details[0] % len(sent)])
            case "step":
                system.step()
            case "drain":
                system.drain()
            case "wait":
                system.clock.time_s += details[0]
                system.step()
            case "kill":
                system.restart()
            case "stop":
                system.aggregator.finish()
                system.restart()
            case "blind":
                system.store.blind = True
                system.drain()
                system.store.blind = False
        if system.store.head().version > visible[-1]:
            visible.append(system.store.head().version)
    for _ in range(15):  # commits that fail are tried again
        system.drain()
        system.clock.time_s += 60
    system.drain()


def check_outcomes(system: System, oracle: Oracle) -> None:
    """Compare what became of every update; each is applied once."""
    entries = [entry for entry in system.outcomes() if entry[1] != "duplicate"]
    applied = [name for name, outcome in entries if outcome == "applied"]
    assert len(applied) == len(set(applied))
    found = {entry for entry in entries if entry[1] != "stale" or entry[0] not in applied}  # forgotten since: stale
    assert found == oracle.outcomes
    names = [name for name, outcome in entries if (name, outcome) in found]
    assert len(names) == len(set(names)), "an outcome stands in the ledger once"
    stored, floor = system.store.load().applied, system.store.head().version - system.settings.staleness_max
    assert all(name in stored for name in applied if stored_base(system, name) >= floor)


def stored_base(system: System, name: str) -> int:
    entries = (entry for commit in system.store.ledger for entry in commit["updates"] if entry["id"] == name)
    return next(entry["base_version"] for entry in entries if entry["outcome"] == "applied")
