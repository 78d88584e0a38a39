-- Runs inside wrk: prints what it measured as one line of JSON, exactly (wrk's own table is rounded).
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\nMYCEL {"duration_us": %d, "requests": %d, "bytes": %d, "p50_us": %d, "p99_us": %d, "max_us": %d, ' ..
    '"errors": {"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}}\n',
    summary.duration, summary.requests, summary.bytes,
    latency:percentile(50), latency:percentile(99), latency.max,
    errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
