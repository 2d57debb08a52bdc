package harmonyflow

import (
	"context"
	"sync"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// storedFormat is that of what this version stores. It is raised by a change that an
// older version would make worse, because it drops fields that it does not know when it
// writes an entry again. Fields that may be lost without harm do not raise it.
const storedFormat = 1

// stamp is the stored format.
type stamp struct {
	Format int `json:"format"`
}

// maxStamp bounds its entry.
const maxStamp = 1 << 10

// formatCheck is what was found of it.
type formatCheck struct {
	mu    sync.Mutex
	known bool
	newer int // that of a newer version, 0 where it is none
}

// understood reports whether what is stored was written by this version, or an older
// one. Where that cannot be read, nothing is started until it can.
func (b *backend) understood(ctx context.Context) bool {
	b.format.mu.Lock()
	defer b.format.mu.Unlock()
	if b.format.known || !b.storage.Exists() || !b.active() { // the active node of the primary alone writes
		return b.format.newer == 0
	}
	s, err := storage.Get[stamp](ctx, b.storage, storage.Format)
	if err == nil && (s == nil || s.Format < storedFormat) {
		err = storage.Put(ctx, b.storage, storage.Format, stamp{storedFormat}, maxStamp)
	}
	if err != nil {
		b.Logger().Warn("the format of what is stored is not known; nothing is started until it is", "error", err)
		return false
	}
	b.format.known = true
	if s != nil && s.Format > storedFormat {
		b.format.newer = s.Format
		b.Logger().Error("what is stored was written by a newer version: nothing is changed, install that version again", "format", s.Format, "known", storedFormat)
	}
	return b.format.newer == 0
}

// mayChange refuses changes of what a newer version has stored. What is served is read.
func (b *backend) mayChange(op logical.Operation) error {
	switch op {
	case logical.CreateOperation, logical.UpdateOperation, logical.PatchOperation, logical.DeleteOperation:
	default:
		return nil
	}
	b.format.mu.Lock()
	defer b.format.mu.Unlock()
	if b.format.newer == 0 {
		return nil
	}
	return badRequest("what is stored was written by a newer version of this engine (format %d; this one knows %d), and would lose what this one does not know: "+
		"install that version again; until then secrets are served and nothing is changed", b.format.newer, storedFormat)
}
