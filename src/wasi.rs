//! WASI for guests: which functions there are, and who answers them.
//!
//! wasmer-wasix answers what neither waits nor reaches out: arguments, environment, clocks and random
//! numbers. The functions of `syscalls` are ours, output among them. Everything else that a module
//! imports is refused when it is called.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use wasmer::{
    AsStoreMut, Extern, ExternType, Function, FunctionEnv, FunctionEnvMut, FunctionType, Imports,
    Module, Type, Value,
};
use wasmer_wasix::runtime::task_manager::TaskWasm;
use wasmer_wasix::virtual_fs::{self, EmptyFileSystem, NullFile};
use wasmer_wasix::wasmer_wasix_types::wasi::Errno;
use wasmer_wasix::{
    PluggableRuntime, Runtime, VirtualTaskManager, WasiEnvBuilder, WasiFunctionEnv,
    WasiThreadError, WasiVersion, generate_import_object_from_env,
};

use crate::child::Child;
use crate::host::HostState;
use crate::module::WASI_MODULES;
use crate::syscalls;

/// What wasmer-wasix answers.
const FROM_WASIX: [&str; 7] = [
    "args_get",
    "args_sizes_get",
    "environ_get",
    "environ_sizes_get",
    "clock_res_get",
    "clock_time_get",
    "random_get",
];
/// Functions that change files: there are none to change.
const CHANGES_FILES: [&str; 12] = [
    "fd_allocate",
    "fd_filestat_set_size",
    "fd_filestat_set_times",
    "fd_pwrite",
    "path_create_directory",
    "path_filestat_set_times",
    "path_link",
    "path_remove_directory",
    "path_rename",
    "path_symlink",
    "path_unlink_file",
    "fd_renumber",
];
/// Hints and wishes, which succeed without effect.
const NO_EFFECT: [&str; 6] = [
    "fd_advise",
    "fd_datasync",
    "fd_sync",
    "fd_fdstat_set_flags",
    "fd_fdstat_set_rights",
    "sched_yield",
];

/// What all guests share of wasmer-wasix.
#[derive(Clone, Debug)]
pub struct Wasi {
    runtime: Arc<dyn Runtime + Send + Sync>,
}

impl Default for Wasi {
    fn default() -> Self {
        Self {
            runtime: Arc::new(PluggableRuntime::new(Arc::new(NoTasks))),
        }
    }
}

/// A task manager without tasks: no guest may start any.
#[derive(Debug)]
struct NoTasks;

impl VirtualTaskManager for NoTasks {
    fn sleep_now(&self, _: Duration) -> Pin<Box<dyn Future<Output = ()> + Send + Sync>> {
        Box::pin(std::future::ready(()))
    }

    fn task_shared(
        &self,
        _: Box<dyn FnOnce() -> futures::future::BoxFuture<'static, ()> + Send>,
    ) -> Result<(), WasiThreadError> {
        Err(WasiThreadError::Unsupported)
    }

    fn task_wasm(&self, _: TaskWasm) -> Result<(), WasiThreadError> {
        Err(WasiThreadError::Unsupported)
    }

    fn task_dedicated(&self, _: Box<dyn FnOnce() + Send>) -> Result<(), WasiThreadError> {
        Err(WasiThreadError::Unsupported)
    }

    fn thread_parallelism(&self) -> Result<usize, WasiThreadError> {
        Ok(1)
    }
}

impl Wasi {
    /// A child's own environment: arguments and variables.
    ///
    /// # Errors
    /// What wasmer-wasix says of it.
    pub fn environment(
        &self,
        store: &mut impl AsStoreMut,
        child: &Child,
    ) -> Result<WasiFunctionEnv, String> {
        let mut builder = WasiEnvBuilder::new(&child.name)
            .args(&child.args)
            .runtime(self.runtime.clone())
            .fs(Arc::new(EmptyFileSystem::default())
                as Arc<dyn virtual_fs::FileSystem + Send + Sync>)
            .stdin(Box::new(NullFile::default()))
            .stdout(Box::new(NullFile::default()))
            .stderr(Box::new(NullFile::default()));
        let go_limit = (child.limits.memory_bytes / 8 * 7).to_string();
        for (name, value) in [
            ("HOSTNAME", child.name.as_str()),
            ("HOME", "/"),
            ("USER", "nobody"),
            // Escape sequences would only be escaped in the log.
            ("NO_COLOR", "1"),
            ("KUBERNETES_SERVICE_HOST", "kubernetes.default"),
            ("KUBERNETES_SERVICE_PORT", "443"),
            // Go collects its garbage in time for the limit.
            ("GOMEMLIMIT", &go_limit),
            // Plain HTTP inside the guest: TLS and credentials are the parent's.
            ("KUBE_RS_DEBUG_OVERRIDE_URL", "http://kubernetes.default"),
        ] {
            builder.add_env(name, value);
        }
        for (name, value) in &child.env {
            builder.add_env(name, value);
        }
        builder.finalize(store).map_err(|e| e.to_string())
    }
}

type Context<'a> = FunctionEnvMut<'a, HostState>;

/// Adds what the module imports of WASI to `imports`.
pub fn define(
    store: &mut impl AsStoreMut,
    module: &Module,
    wasix: &WasiFunctionEnv,
    env: &FunctionEnv<HostState>,
    imports: &mut Imports,
) {
    for namespace in WASI_MODULES {
        let version = if namespace == "wasix_32v1" {
            WasiVersion::Wasix32v1
        } else {
            WasiVersion::Snapshot1
        };
        let mut served: Option<Imports> = None;
        for import in module.imports().filter(|i| i.module() == namespace) {
            let ExternType::Function(ty) = import.ty() else {
                continue;
            };
            let name = import.name();
            let function = if FROM_WASIX.contains(&name) {
                let served = served.get_or_insert_with(|| {
                    generate_import_object_from_env(store, &wasix.env, version)
                });
                served.get_export(namespace, name)
            } else if NO_EFFECT.contains(&name) {
                Some(constant(store, ty, 0).into())
            } else if CHANGES_FILES.contains(&name) {
                Some(constant(store, ty, Errno::Rofs as i32).into())
            } else {
                syscalls::function(store, env, name).map(Extern::from)
            };
            let function =
                function.unwrap_or_else(|| refusal(store, env, namespace, name, ty).into());
            imports.define(namespace, name, function);
        }
    }
}

/// A function that says no, and says so in the log the first time.
fn refusal(
    store: &mut impl AsStoreMut,
    env: &FunctionEnv<HostState>,
    namespace: &str,
    name: &str,
    ty: &FunctionType,
) -> Function {
    let full_name = format!("{namespace}.{name}");
    let results = ty.results().to_vec();
    Function::new_with_env(
        store,
        env,
        ty.clone(),
        move |mut context: Context, _: &[Value]| {
            let state = context.data_mut();
            if !state.refused.contains(&full_name) {
                let child = &state.session.child.name;
                log::warn!(target: child, "{full_name} is not available to a child operator: ENOSYS");
                state.refused.push(full_name.clone());
            }
            Ok(values(&results, Errno::Nosys as i32))
        },
    )
}

/// A function that always returns that.
fn constant(store: &mut impl AsStoreMut, ty: &FunctionType, result: i32) -> Function {
    let results = ty.results().to_vec();
    Function::new(store, ty.clone(), move |_| Ok(values(&results, result)))
}

/// `result` in the types that a module expects.
fn values(types: &[Type], result: i32) -> Vec<Value> {
    let value = |ty: &Type| match ty {
        Type::I64 => Value::I64(result.into()),
        Type::F32 => Value::F32(0.0),
        Type::F64 => Value::F64(0.0),
        _ => Value::I32(result),
    };
    types.iter().map(value).collect()
}
