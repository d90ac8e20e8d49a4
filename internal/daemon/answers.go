package daemon

import (
	"context"

	"github.com/meshhelper/meshhelper/internal/api"
)

// Rules returns the rules as loaded, or as they would be loaded in a language; see
// [explain.Explainer.Rules].
func (d *Daemon) Rules(ctx context.Context, language string) (api.Rules, error) {
	return d.explain.Rules(ctx, language)
}

// Explain says what happens to a packet on this host; see [explain.Explainer.Explain].
func (d *Daemon) Explain(ctx context.Context, q api.Question) (api.Explanation, error) {
	return d.explain.Explain(ctx, q)
}

// Doctor checks every precondition; see [explain.Explainer.Doctor].
func (d *Daemon) Doctor(ctx context.Context) ([]api.Check, error) {
	return d.explain.Doctor(ctx), nil
}
