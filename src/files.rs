//! The files a guest sees: a small read-only tree, and the guest's open descriptors.
//!
//! Nothing of the host's file system is in it. Descriptors are ours, not wasmer-wasix's: they are
//! bounded, and a table of paths and offsets is all that must outlive an instance.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use wasmer_wasix::wasmer_wasix_types::wasi::Errno;

use crate::abi::IDLE_DESCRIPTOR;
use crate::certificates::Certificates;

/// Most files a guest may have open.
const MAX_OPEN: usize = 256;
/// The preopened root.
pub const ROOT: u32 = 3;

/// For programs that insist on a kubeconfig (`--kubeconfig`); what it names is the same server.
const KUBECONFIG: &str = "\
apiVersion: v1
kind: Config
current-context: child
contexts:
- name: child
  context: {cluster: child, user: child}
clusters:
- name: child
  cluster: {server: \"http://kubernetes.default\"}
users:
- name: child
  user: {}
";

/// A read-only tree of files; directories are what paths imply.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    files: BTreeMap<&'static str, Bytes>,
}

/// What a path or descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// stdin, stdout, stderr and the idle descriptor.
    Device,
    /// A directory.
    Directory,
    /// A file of that many bytes.
    File(u64),
}

impl Tree {
    /// The tree of a child: what an in-cluster program looks for, without any secret.
    pub fn for_child(namespace: &str, certificates: &Certificates) -> Self {
        let token = "the-parent-operator-authenticates";
        let hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost\n";
        let files = [
            (
                "/var/run/secrets/kubernetes.io/serviceaccount/token",
                Bytes::from_static(token.as_bytes()),
            ),
            (
                "/var/run/secrets/kubernetes.io/serviceaccount/namespace",
                Bytes::copy_from_slice(namespace.as_bytes()),
            ),
            (
                "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt",
                certificates.authorities.clone(),
            ),
            // Where controller-runtime's webhook server looks, which does not start without.
            (
                "/tmp/k8s-webhook-server/serving-certs/tls.crt",
                certificates.placeholder.clone(),
            ),
            (
                "/tmp/k8s-webhook-server/serving-certs/tls.key",
                certificates.placeholder_key.clone(),
            ),
            (
                "/etc/kubernetes/kubeconfig",
                Bytes::from_static(KUBECONFIG.as_bytes()),
            ),
            ("/etc/hosts", Bytes::from_static(hosts.as_bytes())),
        ];
        Self {
            files: files.into_iter().collect(),
        }
    }

    fn look_up(&self, path: &str) -> Result<Kind, Errno> {
        if let Some(content) = self.files.get(path) {
            return Ok(Kind::File(content.len() as u64));
        }
        if path == "/" {
            return Ok(Kind::Directory);
        }
        let inside = format!("{path}/");
        let next = self.files.range(&*inside..).next();
        if next.is_some_and(|(file, _)| file.starts_with(&inside)) {
            Ok(Kind::Directory)
        } else {
            Err(Errno::Noent)
        }
    }

    /// Names in a directory, each with what it stands for.
    fn entries(&self, directory: &str) -> BTreeMap<String, Kind> {
        let inside = if directory == "/" {
            "/".to_owned()
        } else {
            format!("{directory}/")
        };
        let mut entries = BTreeMap::new();
        for (file, content) in self.files.range(&*inside..) {
            let Some(rest) = file.strip_prefix(&inside) else {
                break;
            };
            match rest.split_once('/') {
                Some((name, _)) => entries.insert(name.to_owned(), Kind::Directory),
                None => entries.insert(rest.to_owned(), Kind::File(content.len() as u64)),
            };
        }
        entries
    }
}

/// Makes an absolute, clean path of one that is relative to a directory. `..` stops at the root.
fn absolute(base: &str, path: &str) -> String {
    let start = if path.starts_with('/') { "" } else { base };
    let mut parts: Vec<&str> = Vec::new();
    for part in start.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Open {
    path: String,
    offset: u64,
}

/// A guest's open descriptors.
#[derive(Clone, Debug)]
pub struct Descriptors {
    tree: Arc<Tree>,
    open: BTreeMap<u32, Open>,
}

impl Descriptors {
    /// A fresh table: only the root is open.
    pub fn new(tree: Arc<Tree>) -> Self {
        let root = Open {
            path: "/".into(),
            offset: 0,
        };
        Self {
            tree,
            open: BTreeMap::from([(ROOT, root)]),
        }
    }

    fn get(&self, descriptor: u32) -> Result<&Open, Errno> {
        self.open.get(&descriptor).ok_or(Errno::Badf)
    }

    fn content(&self, descriptor: u32) -> Result<(&Bytes, u64), Errno> {
        let open = self.get(descriptor)?;
        let content = self.tree.files.get(&*open.path).ok_or(Errno::Isdir)?;
        Ok((content, open.offset))
    }

    /// What a descriptor stands for.
    pub fn kind(&self, descriptor: u32) -> Result<Kind, Errno> {
        if descriptor < ROOT || descriptor == IDLE_DESCRIPTOR {
            return Ok(Kind::Device);
        }
        self.tree.look_up(&self.get(descriptor)?.path)
    }

    /// What a path stands for.
    pub fn path_kind(&self, base: u32, path: &str) -> Result<Kind, Errno> {
        self.tree.look_up(&absolute(&self.get(base)?.path, path))
    }

    /// Opens a path for reading.
    pub fn open(&mut self, base: u32, path: &str, directory_only: bool) -> Result<u32, Errno> {
        let path = absolute(&self.get(base)?.path, path);
        if directory_only && self.tree.look_up(&path)? != Kind::Directory {
            return Err(Errno::Notdir);
        }
        self.tree.look_up(&path)?;
        if self.open.len() >= MAX_OPEN {
            return Err(Errno::Mfile);
        }
        let free = (ROOT + 1..)
            .find(|d| !self.open.contains_key(d))
            .ok_or(Errno::Mfile)?;
        self.open.insert(free, Open { path, offset: 0 });
        Ok(free)
    }

    /// Closes a descriptor. The standard ones and the idle one stay.
    pub fn close(&mut self, descriptor: u32) -> Result<(), Errno> {
        if self.kind(descriptor) == Ok(Kind::Device) {
            return Ok(());
        }
        self.open.remove(&descriptor).map(|_| ()).ok_or(Errno::Badf)
    }

    /// The next bytes of a file, at most `length`; moves the offset.
    pub fn read(&mut self, descriptor: u32, length: usize) -> Result<Bytes, Errno> {
        match descriptor {
            IDLE_DESCRIPTOR => return Err(Errno::Again),
            0 => return Ok(Bytes::new()),
            _ => {}
        }
        let (_, offset) = self.content(descriptor)?;
        let bytes = self.read_at(descriptor, offset, length)?;
        if let Some(open) = self.open.get_mut(&descriptor) {
            open.offset += bytes.len() as u64;
        }
        Ok(bytes)
    }

    /// Bytes of a file at an offset, at most `length`.
    pub fn read_at(&self, descriptor: u32, offset: u64, length: usize) -> Result<Bytes, Errno> {
        let (content, _) = self.content(descriptor)?;
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(content.len());
        let end = start.saturating_add(length).min(content.len());
        Ok(content.slice(start..end))
    }

    /// Moves the offset: `whence` 0 from the start, 1 from where it is, 2 from the end.
    pub fn seek(&mut self, descriptor: u32, offset: i64, whence: u8) -> Result<u64, Errno> {
        let (content, at) = self.content(descriptor)?;
        let base = match whence {
            0 => 0,
            1 => at,
            2 => content.len() as u64,
            _ => return Err(Errno::Inval),
        };
        let offset = base.checked_add_signed(offset).ok_or(Errno::Inval)?;
        if let Some(open) = self.open.get_mut(&descriptor) {
            open.offset = offset;
        }
        Ok(offset)
    }

    /// The entries of an open directory, in a stable order.
    pub fn entries(&self, descriptor: u32) -> Result<Vec<(String, Kind)>, Errno> {
        let path = &self.get(descriptor)?.path;
        if self.tree.look_up(path)? != Kind::Directory {
            return Err(Errno::Notdir);
        }
        Ok(self.tree.entries(path).into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "var/run/secrets/kubernetes.io/serviceaccount/token";

    fn descriptors() -> Descriptors {
        Descriptors::new(Arc::new(Tree::for_child("ns", &Certificates::default())))
    }

    #[test]
    fn files_are_read_in_parts_and_sought() {
        let mut d = descriptors();
        let fd = d
            .open(ROOT, &TOKEN.replace("token", "namespace"), false)
            .unwrap();
        assert_eq!(fd, 4);
        assert_eq!(&d.read(fd, 1).unwrap()[..], b"n");
        assert_eq!(&d.read(fd, 9).unwrap()[..], b"s");
        assert_eq!(&d.read(fd, 9).unwrap()[..], b"");
        assert_eq!(d.seek(fd, -1, 2), Ok(1));
        assert_eq!(&d.read(fd, 9).unwrap()[..], b"s");
        assert_eq!(d.seek(fd, -9, 0), Err(Errno::Inval));
        assert_eq!(&d.read_at(fd, u64::MAX, usize::MAX).unwrap()[..], b"");
        d.close(fd).unwrap();
        assert_eq!(d.read(fd, 1), Err(Errno::Badf));
    }

    #[test]
    fn paths_cannot_leave_the_tree() {
        let d = descriptors();
        assert_eq!(
            d.path_kind(ROOT, "../../etc/hosts"),
            d.path_kind(ROOT, "/etc/hosts")
        );
        assert_eq!(d.path_kind(ROOT, "etc/passwd"), Err(Errno::Noent));
        assert_eq!(d.path_kind(ROOT, "et"), Err(Errno::Noent));
        assert_eq!(d.path_kind(ROOT, "var/run/."), Ok(Kind::Directory));
        assert_eq!(d.path_kind(9, "etc"), Err(Errno::Badf));
    }

    #[test]
    fn directories_list_what_is_in_them() {
        let mut d = descriptors();
        assert_eq!(d.open(ROOT, "etc/hosts", true), Err(Errno::Notdir));
        let names: Vec<_> = d
            .entries(ROOT)
            .unwrap()
            .into_iter()
            .map(|(n, _)| n)
            .collect();
        assert_eq!(names, ["etc", "tmp", "var"]);
        let fd = d.open(ROOT, "etc", true).unwrap();
        assert_eq!(
            d.entries(fd).unwrap(),
            [
                ("hosts".to_owned(), Kind::File(34)),
                ("kubernetes".to_owned(), Kind::Directory)
            ]
        );
        assert_eq!(d.read(fd, 1), Err(Errno::Isdir));
    }

    #[test]
    fn open_files_are_bounded_and_devices_stay() {
        let mut d = descriptors();
        let opened = std::iter::repeat_with(|| d.open(ROOT, "etc/hosts", false))
            .take_while(Result::is_ok)
            .count();
        assert_eq!(opened, MAX_OPEN - 1);
        assert_eq!(d.open(ROOT, "etc/hosts", false), Err(Errno::Mfile));
        for device in [0, 1, 2, IDLE_DESCRIPTOR] {
            assert_eq!(d.kind(device), Ok(Kind::Device));
            d.close(device).unwrap();
        }
        assert_eq!(d.read(IDLE_DESCRIPTOR, 1), Err(Errno::Again));
        assert_eq!(&d.read(0, 1).unwrap()[..], b"");
    }
}
