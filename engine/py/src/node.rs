//! `Node`: the data path of a storage node.

use crate::ids::{hex, parse_id};
use hci_engine_core::io::{listen_tcp, listen_unix};
use hci_engine_core::node::{Identity, Inventory, NodeHandle};
use hci_engine_core::store::real::RealDisk;
use hci_engine_core::store::{Store, StoreConfig, StoreError};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTimeoutError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A storage node's store, and the event loop that serves it to gateways. Opening it locks the
/// folder, replays the log and raises the start counter; `listen` lets gateways in.
#[pyclass(module = "engine._engine", frozen)]
pub struct Node {
    core: Mutex<Option<Arc<NodeHandle>>>,
    #[pyo3(get)]
    start_counter: u64,
    #[pyo3(get)]
    store_id: String,
    #[pyo3(get)]
    created: bool,
}

impl Node {
    fn core(&self) -> PyResult<Arc<NodeHandle>> {
        let core = self.core.lock().unwrap_or_else(PoisonError::into_inner);
        core.clone().ok_or_else(|| PyRuntimeError::new_err("the node is stopped"))
    }
}

#[pymethods]
impl Node {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[pyo3(signature = (data_dir, *, cluster, name, new_store_id, boot, log_bytes, seen_counter=0,
                        distrusted=Vec::new(), poll_us=0))]
    fn new(
        py: Python<'_>,
        data_dir: &str,
        cluster: &str,
        name: String,
        new_store_id: &str,
        boot: &str,
        log_bytes: u64,
        seen_counter: u64,
        distrusted: Vec<String>,
        poll_us: u64,
    ) -> PyResult<Self> {
        let distrusted =
            distrusted.iter().map(|image| parse_id(image)).collect::<PyResult<Vec<_>>>()?;
        let cluster = parse_id(cluster)?.0;
        let mut config = StoreConfig::new(cluster, &name, parse_id(new_store_id)?.0, log_bytes);
        // Small segments are made, checkpointed and recycled in small steps.
        config.segment_bytes = Some((log_bytes / 8).clamp(4 << 20, 32 << 20) as u32 / 4096 * 4096);
        config.seen_counter = seen_counter;
        let boot = parse_id(boot)?.0;
        py.detach(|| {
            let disk = RealDisk::open_dir(Path::new(data_dir)).map_err(|errno| {
                PyOSError::new_err((errno.raw_os_error(), data_dir.to_string()))
            })?;
            let (mut store, recovery) = Store::open(disk, &config).map_err(refused)?;
            if recovery.damaged {
                return Err(PyRuntimeError::new_err(
                    "the log is damaged: writes that were flushed are missing from it",
                ));
            }
            store.distrust(distrusted);
            let (start_counter, id) = (store.instance(), store.id());
            let created = recovery.created;
            let identity = Identity { cluster, node: name, store: id, boot };
            let core =
                Arc::new(NodeHandle::start(store, identity, Duration::from_micros(poll_us))?);
            let store_id = hex(&id);
            Ok(Node { core: Mutex::new(Some(core)), start_counter, store_id, created })
        })
    }

    /// Lets gateways in at a TCP address, `HOST:PORT` with a numeric host.
    fn listen_tcp(&self, address: &str) -> PyResult<()> {
        let parsed = address.parse().map_err(|_| {
            PyValueError::new_err(format!("'{address}' is not an address and port"))
        })?;
        self.core()?.listen(listen_tcp(parsed)?);
        Ok(())
    }

    /// Lets gateways of this host in at a unix socket.
    fn listen_unix(&self, path: &str) -> PyResult<()> {
        self.core()?.listen(listen_unix(Path::new(path))?);
        Ok(())
    }

    /// Deletes an image for ever; its tombstone is durable on return.
    fn delete(&self, py: Python<'_>, image: &str) -> PyResult<()> {
        let (core, image) = (self.core()?, parse_id(image)?);
        py.detach(|| core.delete(image)).ok_or_else(no_answer)?.map_err(refused)
    }

    /// The content of a shard, or None where nothing was written.
    fn read_shard<'py>(
        &self,
        py: Python<'py>,
        image: &str,
        layers: Vec<u32>,
        shard: u64,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let (core, image) = (self.core()?, parse_id(image)?);
        let found = py.detach(|| core.read_shard(image, layers, shard));
        let content = found.ok_or_else(no_answer)?.map_err(refused)?;
        Ok(content.map(|content| PyBytes::new(py, &content)))
    }

    /// Physical bytes that an image takes.
    fn usage(&self, py: Python<'_>, image: &str) -> PyResult<u64> {
        let (core, image) = (self.core()?, parse_id(image)?);
        Ok(py.detach(|| core.usage(image))?)
    }

    /// Records of the images that are here, and ids of those that were deleted.
    fn inventory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let core = self.core()?;
        inventory_dict(py, &py.detach(|| core.inventory()).ok_or_else(no_answer)?)
    }

    /// Images that have a folder on the disk, with a record or without one.
    fn folders(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        let core = self.core()?;
        let found = py.detach(|| core.folders())?;
        Ok(found.iter().map(ToString::to_string).collect())
    }

    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let core = self.core()?;
        let status = py.detach(|| core.status()).ok_or_else(no_answer)?;
        let dict = PyDict::new(py);
        dict.set_item("capacity_bytes", status.capacity_bytes)?;
        dict.set_item("free_bytes", status.free_bytes)?;
        dict.set_item("images", status.images)?;
        dict.set_item("connections", status.connections)?;
        dict.set_item("flush_number", status.flush_number)?;
        dict.set_item("log_bytes", status.log_bytes)?;
        dict.set_item("dirty_shards", status.dirty_shards)?;
        dict.set_item("no_space", status.no_space)?;
        dict.set_item("counters", HashMap::from(status.counters.named()))?;
        Ok(dict)
    }

    /// Why the node has ended by itself; None while it runs.
    fn failure(&self) -> PyResult<Option<String>> {
        Ok(self.core()?.failure())
    }

    /// Syncs and ends, whoever asks it something meanwhile: the store may be opened again.
    fn stop(&self, py: Python<'_>) {
        let core = self.core.lock().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| core.map(|core| core.stop()));
    }
}

/// What `inventory` says, as Python has it.
pub(crate) fn inventory_dict<'py>(
    py: Python<'py>,
    found: &Inventory,
) -> PyResult<Bound<'py, PyDict>> {
    let images = found.images.iter().map(|(id, record)| {
        let (head, image) = (&record.head, PyDict::new(py));
        image.set_item("image", id.to_string())?;
        image.set_item("epoch", head.epoch)?;
        image.set_item("holder", hex(&head.holder))?;
        image.set_item("generation", head.generation)?;
        image.set_item("digest", PyBytes::new(py, &head.digest))?;
        image.set_item("body", PyBytes::new(py, &record.body))?;
        let emptied = found.emptied.get(id);
        let is_emptied = |layer| emptied.is_some_and(|layers| layers.contains(layer));
        let merging: HashMap<u32, bool> =
            record.merging.iter().map(|layer| (*layer, is_emptied(layer))).collect();
        image.set_item("merging", merging)?;
        Ok(image)
    });
    let dict = PyDict::new(py);
    dict.set_item("images", images.collect::<PyResult<Vec<_>>>()?)?;
    let deleted: Vec<String> = found.deleted.iter().map(ToString::to_string).collect();
    dict.set_item("deleted", deleted)?;
    let distrusted: Vec<String> = found.distrusted.iter().map(ToString::to_string).collect();
    dict.set_item("distrusted", distrusted)?;
    Ok(dict)
}

fn no_answer() -> PyErr {
    PyTimeoutError::new_err("the node's event loop does not answer")
}

fn refused(error: StoreError) -> PyErr {
    match error {
        StoreError::UnknownImage { .. } => PyValueError::new_err(error.to_string()),
        error => PyRuntimeError::new_err(error.to_string()),
    }
}
