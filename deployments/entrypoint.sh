#!/bin/sh
# The image's first process. SIGTERM here is a spot node that is taken back, an eviction or a stop.
# Prefect's runner would then kill a training at once, because it holds the signal back until its
# update is saved; so the training gets the signal first, and Prefect when the training has ended.
# Where Prefect is to start the run again by itself (reschedule), all is left to it.
# A shell's background child ignores SIGINT, with which Prefect's worker ends itself.
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
