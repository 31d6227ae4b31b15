"""Training and sampling share the device: the one that has used it for less time goes next."""


class DeviceShare:
    """A `DeviceShare` counts the seconds that training and sampling have used.

    The one that comes back after not wanting the device gets no credit for that time, but still
    owes what it had used beyond the other: a client that trains one long batch at a time, with a
    pause after each, takes no more than one that never pauses.
    """

    def __init__(self) -> None:
        self._used = {"training": 0.0, "sampling": 0.0}
        self._wanted = {"training": False, "sampling": False}

    def trains_next(self, *, training: bool, sampling: bool) -> bool:
        """Tell whether training goes next, of those that want the device now (one of them does)."""
        wanted = {"training": training, "sampling": sampling}
        least = (
            max(self._used.values())
            if not any(self._wanted.values())
            else min(used for name, used in self._used.items() if self._wanted[name])
        )
        for name, wants in wanted.items():
            if wants and not self._wanted[name]:
                self._used[name] = max(self._used[name], least)
        self._wanted = wanted
        if training and sampling:
            return self._used["training"] <= self._used["sampling"]
        return training

    def charge(self, *, training: bool, seconds: float) -> None:
        """Count the seconds for which training, or sampling, has run."""
        self._used["training" if training else "sampling"] += seconds
