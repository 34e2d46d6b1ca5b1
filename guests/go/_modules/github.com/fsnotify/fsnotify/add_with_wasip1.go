package fsnotify

// AddWith is Add.
func (w *Watcher) AddWith(name string, _ ...addOpt) error { return w.Add(name) }
