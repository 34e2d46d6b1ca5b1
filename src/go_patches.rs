//! What is missing in Go modules that do not know `wasip1`, by module and version.
//!
//! To teach one more, add a [`Patch`] to [`PATCHES`]: mostly a file that the module has for another
//! system will do ([`Step::Like`]); else put one beneath `guests/go/_modules/MODULE/`.

use crate::carried;
use crate::toolchain::Carried;

/// The numbers of a version.
type Numbers = (u64, u64, u64);

/// What is wrong with some versions of a module, and what is done about it.
pub struct Patch {
    /// Path of the module, without the `/v2` of a major version.
    module: &'static str,
    /// The first version that needs it.
    from: Numbers,
    /// The first version that does not.
    below: Numbers,
    /// What is done, for people.
    pub why: &'static str,
    /// Files that a version does not have are passed over.
    pub steps: &'static [Step],
}

/// What is done to a copy of a module.
#[derive(Debug)]
pub enum Step {
    /// Adds files.
    Add(&'static [Carried]),
    /// Takes a file for another system for `wasip1`, too.
    Like(&'static str),
    /// Leaves a file out.
    Without(&'static str),
    /// Replaces a text in a file.
    Change(&'static str, &'static str, &'static str),
}

/// Any version.
const FIRST: Numbers = (0, 0, 0);
/// No version is known to do without.
const NEVER: Numbers = (u64::MAX, 0, 0);

use Step::{Add, Change, Like, Without};

const PATCHES: &[Patch] = &[
    Patch {
        module: "github.com/adrg/xdg",
        from: FIRST,
        below: NEVER,
        why: "uses the directories of Unix",
        steps: &[
            Like("paths_unix.go"),
            Like("internal/pathutil/pathutil_unix.go"),
            Like("internal/userdirs/config_unix.go"),
        ],
    },
    Patch {
        module: "github.com/coreos/go-systemd",
        from: FIRST,
        below: NEVER,
        why: "writes to no journal",
        steps: &[
            Like("journal/journal_windows.go"),
            Without("journal/journal_unix.go"),
        ],
    },
    Patch {
        module: "github.com/creack/pty",
        from: (1, 1, 21),
        below: NEVER,
        why: "has no pseudo-terminals",
        steps: &[
            Like("ioctl_unsupported.go"),
            Like("start_windows.go"),
            Like("winsize_unsupported.go"),
            Without("ioctl_inner.go"),
            Without("start.go"),
            Without("winsize_unix.go"),
        ],
    },
    Patch {
        module: "github.com/docker/go-connections",
        from: FIRST,
        below: NEVER,
        why: "does without names of sockets and locks that there are not",
        steps: &[
            Change(
                "sockets/sockets_unix.go",
                "len(syscall.RawSockaddrUnix{}.Path)",
                "108",
            ),
            Change("sockets/sockets.go", "\t\"syscall\"\n", ""),
            Change(
                "sockets/sockets.go",
                "len(syscall.RawSockaddrUnix{}.Path)",
                "108",
            ),
            Change(
                "sockets/unix_socket_unix.go",
                "\tsyscall.ForkLock.RLock()\n",
                "",
            ),
            Change(
                "sockets/unix_socket_unix.go",
                "\tsyscall.ForkLock.RUnlock()\n",
                "",
            ),
        ],
    },
    Patch {
        module: "github.com/fsnotify/fsnotify",
        from: FIRST,
        below: (1, 7, 0),
        why: "gets a watcher that never reports",
        steps: &[
            Add(
                carried!("../guests/go/_modules/github.com/fsnotify/fsnotify": "quiet_watcher_wasip1.go"),
            ),
            Without("backend_other.go"),
            Without("fsnotify_unsupported.go"),
        ],
    },
    Patch {
        module: "github.com/fsnotify/fsnotify",
        from: (1, 7, 0),
        below: (1, 8, 0),
        why: "gets a watcher that never reports",
        steps: &[
            Add(
                carried!("../guests/go/_modules/github.com/fsnotify/fsnotify": "quiet_watcher_wasip1.go", "add_with_wasip1.go"),
            ),
            Without("backend_other.go"),
        ],
    },
    Patch {
        module: "github.com/fsnotify/fsnotify",
        from: (1, 8, 0),
        below: NEVER,
        why: "gets a watcher that never reports",
        steps: &[
            Add(carried!("../guests/go/_modules/github.com/fsnotify/fsnotify": "quiet_wasip1.go")),
            Without("backend_other.go"),
        ],
    },
    Patch {
        module: "github.com/go-git/go-git",
        from: FIRST,
        below: NEVER,
        why: "uses its file for another WebAssembly",
        steps: &[
            Like("worktree_js.go"),
            Change(
                "worktree_js_wasip1.go",
                "time.Unix(int64(os.Ctime), int64(os.CtimeNsec))",
                "time.Unix(0, int64(os.Ctime))",
            ),
        ],
    },
    Patch {
        module: "github.com/godbus/dbus",
        from: FIRST,
        below: NEVER,
        why: "does without sockets of Unix",
        steps: &[
            Without("transport_unix.go"),
            Change(
                "conn_unix.go",
                "\ttr := newUnixTransportFromConn(conn)\n\treturn newConn(tr, opts...)\n",
                "\treturn nil, errors.New(\"dbus: no sockets of Unix\")\n",
            ),
        ],
    },
    Patch {
        module: "github.com/hashicorp/go-sockaddr",
        from: FIRST,
        below: (1, 0, 6),
        why: "finds no network interface",
        steps: &[Add(
            carried!("../guests/go/_modules/github.com/hashicorp/go-sockaddr": "route_info_wasip1.go", "route_info_type_wasip1.go"),
        )],
    },
    Patch {
        module: "github.com/hashicorp/go-sockaddr",
        from: (1, 0, 6),
        below: NEVER,
        why: "finds no network interface",
        steps: &[Add(
            carried!("../guests/go/_modules/github.com/hashicorp/go-sockaddr": "route_info_wasip1.go"),
        )],
    },
    Patch {
        module: "github.com/in-toto/in-toto-golang",
        from: FIRST,
        below: NEVER,
        why: "looks at file modes",
        steps: &[
            Like("in_toto/util_windows.go"),
            Without("in_toto/util_unix.go"),
        ],
    },
    Patch {
        module: "github.com/moby/sys/signal",
        from: FIRST,
        below: NEVER,
        why: "names no signal by a number that there is not",
        steps: &[Change("signal.go", "return -1,", "return 0,")],
    },
    Patch {
        module: "github.com/moby/sys/user",
        from: FIRST,
        below: NEVER,
        why: "uses the files of Unix",
        steps: &[Like("lookup_unix.go")],
    },
    Patch {
        module: "github.com/moby/term",
        from: FIRST,
        below: (0, 5, 0),
        why: "has no terminal",
        steps: &[
            Add(carried!("../guests/go/_modules/github.com/moby/term": "old_term_wasip1.go")),
            Without("tc.go"),
            Without("term.go"),
            Without("termios.go"),
            Without("termios_nonbsd.go"),
            Without("winsize.go"),
        ],
    },
    Patch {
        module: "github.com/moby/term",
        from: (0, 5, 0),
        below: NEVER,
        why: "has no terminal",
        steps: &[
            Add(carried!("../guests/go/_modules/github.com/moby/term": "term_wasip1.go")),
            Without("term_unix.go"),
            Without("termios_unix.go"),
            Without("termios_nonbsd.go"),
        ],
    },
    Patch {
        module: "github.com/muesli/termenv",
        from: (0, 12, 0),
        below: NEVER,
        why: "uses its file for systems without a terminal",
        steps: &[Like("termenv_other.go")],
    },
    Patch {
        module: "github.com/prometheus/prometheus",
        from: FIRST,
        below: NEVER,
        why: "maps no files",
        steps: &[
            Like("tsdb/fileutil/flock_js.go"),
            Like("tsdb/fileutil/mmap_js.go"),
            Without("tsdb/fileutil/mmap_unix.go"),
        ],
    },
    Patch {
        module: "github.com/sirupsen/logrus",
        from: (1, 4, 0),
        below: (1, 9, 4),
        why: "gets the terminal check that it lacks",
        steps: &[Add(
            carried!("../guests/go/_modules/github.com/sirupsen/logrus": "terminal_check_wasip1.go"),
        )],
    },
    Patch {
        module: "github.com/syndtr/goleveldb",
        from: FIRST,
        below: NEVER,
        why: "uses its file for systems without locks",
        steps: &[Like("leveldb/storage/file_storage_nacl.go")],
    },
    Patch {
        module: "go.etcd.io/bbolt",
        from: FIRST,
        below: NEVER,
        why: "opens no database",
        steps: &[
            Add(carried!("../guests/go/_modules/go.etcd.io/bbolt": "bolt_wasip1.go")),
            Like("bolt_386.go"),
            Like("internal/common/bolt_386.go"),
            Without("bolt_unix.go"),
            Without("mlock_unix.go"),
        ],
    },
    Patch {
        module: "go.etcd.io/etcd/client/pkg",
        from: FIRST,
        below: NEVER,
        why: "locks no files",
        steps: &[
            Add(
                carried!("../guests/go/_modules/go.etcd.io/etcd/client/pkg": "fileutil/lock_wasip1.go"),
            ),
            Without("fileutil/lock_flock.go"),
            Without("fileutil/lock_unix.go"),
        ],
    },
    Patch {
        module: "golang.org/x/sys",
        from: FIRST,
        below: (0, 27, 0),
        why: "gets an empty package unix, which others import in vain",
        steps: &[Add(
            carried!("../guests/go/_modules/golang.org/x/sys": "unix/empty_wasip1.go"),
        )],
    },
    Patch {
        module: "k8s.io/kubectl",
        from: FIRST,
        below: NEVER,
        why: "has no terminal and no umask",
        steps: &[
            Like("pkg/util/umask_windows.go"),
            Like("pkg/util/term/resizeevents_windows.go"),
            Without("pkg/util/umask.go"),
            Without("pkg/util/term/resizeevents.go"),
        ],
    },
    Patch {
        module: "sigs.k8s.io/controller-runtime",
        from: FIRST,
        below: NEVER,
        why: "starts without the certificate of its webhook server, which nobody reaches",
        steps: &[Change(
            "pkg/webhook/server.go",
            "\t\tcertWatcher, err := certwatcher.New(certPath, keyPath)\n",
            "\t\tif _, err := os.Stat(certPath); os.IsNotExist(err) {\n\t\t\tlog.Info(\"Webhook server is off: it has no certificate, and nobody reaches a child operator\")\n\t\t\t<-ctx.Done()\n\t\t\treturn nil\n\t\t}\n\t\tcertWatcher, err := certwatcher.New(certPath, keyPath)\n",
        )],
    },
];

/// What is known of a version of a module.
pub fn find(module: &str, version: &str) -> Option<&'static Patch> {
    let release = release(version);
    PATCHES
        .iter()
        .find(|patch| is_same(patch.module, module) && (patch.from..patch.below).contains(&release))
}

/// Whether a patch for some versions of a module exists.
pub fn is_known(module: &str) -> bool {
    PATCHES.iter().any(|patch| is_same(patch.module, module))
}

/// Whether `module` is `base` in any major version.
fn is_same(base: &str, module: &str) -> bool {
    module.strip_prefix(base).is_some_and(|rest| {
        rest.is_empty()
            || rest
                .strip_prefix("/v")
                .is_some_and(|major| major.bytes().all(|b| b.is_ascii_digit()))
    })
}

/// The numbers of `v1.9.3` or `v1.9.3-pre+incompatible`.
fn release(version: &str) -> Numbers {
    let numbers = version
        .trim_start_matches('v')
        .split(['-', '+'])
        .next()
        .unwrap_or_default();
    let mut numbers = numbers.split('.').map(|n| n.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_found_by_version() {
        assert!(find("github.com/sirupsen/logrus", "v1.9.3").is_some());
        assert!(find("github.com/sirupsen/logrus", "v1.9.4").is_none());
        assert!(is_known("github.com/sirupsen/logrus"));
        let of = |version| find("github.com/fsnotify/fsnotify", version).map(|p| p.steps.len());
        assert_eq!(of("v1.4.9"), Some(3));
        assert_eq!(of("v1.7.0"), Some(2));
        assert_eq!(of("v1.10.1"), Some(2));
        assert_ne!(
            find("github.com/fsnotify/fsnotify", "v1.7.0").map(|p| p.from),
            find("github.com/fsnotify/fsnotify", "v1.8.0").map(|p| p.from)
        );
    }

    #[test]
    fn major_versions_are_the_same_module() {
        assert!(find("github.com/go-git/go-git/v5", "v5.19.3").is_some());
        assert!(find("github.com/go-git/go-git-fixtures/v5", "v5.0.0").is_none());
        assert!(find("github.com/godbus/dbus/v5/x", "v5.0.0").is_none());
    }

    #[test]
    fn versions_are_numbers() {
        assert_eq!(release("v1.9.3"), (1, 9, 3));
        assert_eq!(release("v20.10.1+incompatible"), (20, 10, 1));
        assert_eq!(release("v0.0.0-20180306012644-bacd9c7ef1dd"), (0, 0, 0));
    }
}
