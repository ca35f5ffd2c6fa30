#!/bin/sh
# The image's first process. It gets SIGTERM when a spot node is reclaimed, at an eviction or a stop.
# Prefect's runner would then kill a training at once, because the training delays the signal until its
# update is saved; so the training gets the signal first, and Prefect when the training has ended.
# If Prefect is configured to reschedule the run, it gets the signal at once.
# By default a shell's background child ignores SIGINT, by which Prefect's worker ends itself.
env --default-signal=INT,QUIT "$@" &
child=$!

engines() {
  grep -lzx 'prefect\.\(flow_\)\?engine' /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3
}

leave() {
  trap '' TERM INT
  if [ "$PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR" != reschedule ]; then
    for pid in $(engines); do kill -TERM "$pid" 2>/dev/null; done
    while [ -n "$(engines)" ]; do sleep 0.2; done
  fi
  kill -TERM "$child" 2>/dev/null
}

trap leave TERM INT
while :; do
  wait "$child"
  status=$?
  kill -0 "$child" 2>/dev/null || exit "$status"
done
