"""stub"""
def write(directory, kind, runs, outcomes, command):
    lines=["name,N,tokens,flops,loss,seconds,training"]
    for r in runs:
        o=outcomes[r.name]
        lines.append(f'{r.name} {o.parameters.get("total")},{o.tokens},{o.flops:.4g},{o.loss},{o.seconds:.2f},{o.training_seconds:.2f},{o.reason}')
    (directory/"runs.csv").write_text("\n".join(lines)+"\n")
    return "\n".join(lines)
