//! What a node does with each kind of request: checks it against the session and the image's record,
//! has the store do it, and says what to answer, and when.

use super::pulls::{PullOrder, Pulls};
use super::sessions::{Reader, Session, Sessions};
use crate::checksum::Checksum;
use crate::content::Block;
use crate::geometry::{BLOCK_BYTES, ImageId, LayerId, ShardKey, Tag};
use crate::io::SharedMemory;
use crate::rules::{Rule, broken};
use crate::store::{
    BlockState, Chain, CopyBlock, ImageRecord, Placed, ReadBuffer, RecordHead, Stamp, Store,
    StoreError, WRITTEN_PER_PAGE, WriteOp, WrittenCursor,
};
use crate::wire::codec::Short;
use crate::wire::copies::{FETCH_BLOCKS_MAX, PeerFetch, Pull};
use crate::wire::messages::{
    self, Attach, AttachReader, BlocksReply, Copy, DIRTY_ENTRIES_MAX, DirtyEntry, DirtyFrom,
    DirtyReply, Flush, Head, Io, IoInto, Level, Peek, PeekReply, SCRUB_BLOCKS_MAX, ScrubReply,
    ShardRange, WRITTEN_SHARDS_MAX, WrittenAbove, WrittenReply,
};
use crate::wire::{Frame, PAYLOAD_BYTES_MAX, Status, flag, kind};
use bytes::{BufMut, Bytes, BytesMut};

/// Peers whose flush numbers are kept for an image, and bytes of a node's name: what is kept has to fit
/// into an answer to PEEK.
const PEERS_MAX: usize = 1024;
const NAME_BYTES_MAX: usize = 63;

const _: () = assert!(WRITTEN_PER_PAGE <= WRITTEN_SHARDS_MAX, "an answer holds a page");

/// What came of a request.
pub(crate) enum Outcome {
    /// Answer with this head and payload once the batch is in the log.
    Answer { status: Status, head: Bytes, payload: Bytes },
    /// Answer with this head: so many bytes of data are in the peer's memory.
    Placed { head: Bytes, bytes: usize },
    /// Answer once everything so far is durable; a flush's answer names the flush number.
    AnswerDurable { with_number: bool },
    /// Have these blocks fetched from another node, and answer when they are applied (`Requests::land`).
    Pull(Box<PullOrder>),
    /// The log is full: try again after a checkpoint, and take nothing else from the connection.
    Park,
    /// There is more to do for it: try again when others had a turn, and take nothing else from the connection.
    Again,
    /// The peer breaks the protocol.
    Close,
}

/// Scratch space that requests share.
#[derive(Default)]
pub(crate) struct Scratch {
    checksums: Vec<Checksum>,
    states: Vec<Block>,
    heads: BytesMut,
    data: BytesMut,
}

/// One request being worked on.
pub(crate) struct Requests<'a> {
    pub store: &'a mut Store,
    pub sessions: &'a mut Sessions,
    pub scratch: &'a mut Scratch,
    pub pulls: &'a mut Pulls,
    pub connection: u64,
    /// What the peer has handed over for answers.
    pub memory: Option<&'a mut SharedMemory>,
}

/// How a request ends early.
pub(super) enum Refused {
    Status(Status),
    BadBlock(u32),
    Park,
    Again,
    Close,
}

impl From<Short> for Refused {
    fn from(_: Short) -> Refused {
        Refused::Close
    }
}

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Refused {
        Refused::Status(match error {
            StoreError::LogFull => return Refused::Park,
            StoreError::BadBlock { block, .. } => return Refused::BadBlock(block),
            StoreError::BadChecksum { .. } => Status::BadChecksum,
            StoreError::UnknownImage { .. } => Status::NoRecord,
            StoreError::RecordLower { .. } | StoreError::RecordConflict { .. } => {
                Status::StaleEpoch
            }
            StoreError::NotMerged { .. } => Status::NoLayers,
            StoreError::EpochLower { .. } => Status::StaleEpoch,
            StoreError::Deleted { .. } => Status::Deleted,
            StoreError::NoSpace => Status::NoSpace,
            StoreError::DirtyFull => Status::DirtyFull,
            StoreError::OutOfRange | StoreError::TooLarge => Status::Malformed,
            _ => Status::Io,
        })
    }
}

pub(super) type Step<T = Outcome> = Result<T, Refused>;

fn ok() -> Outcome {
    Outcome::Answer { status: Status::Ok, head: Bytes::new(), payload: Bytes::new() }
}

/// A head that does not fit its kind is the end here too, though nobody would look into it.
fn ping(frame: &Frame) -> Step {
    let fits = frame.head.is_empty() && frame.payload.is_empty();
    if fits { Ok(ok()) } else { Err(Refused::Close) }
}

impl Requests<'_> {
    /// Does what `frame` asks for. What it overtakes is dropped before, and answered by then.
    pub(crate) fn handle(&mut self, frame: &Frame) -> Outcome {
        self.pulls.overtaken(self.connection, frame);
        let done = match frame.kind {
            kind::WRITE => self.write(frame),
            kind::READ => self.read(frame),
            kind::FLUSH => self.flush(frame),
            kind::ZERO => self.zero(frame),
            kind::READ_INTO => self.read_into(frame),
            kind::STATUS => self.status(frame),
            kind::PING => ping(frame),
            kind::PEEK => self.peek(frame),
            kind::RECORD => self.record(frame),
            kind::ATTACH => self.attach(frame),
            kind::ATTACH_READER => self.attach_reader(frame),
            kind::DETACH => self.detach(frame),
            kind::CONFIRM => self.confirm(frame),
            kind::CLEAR => self.clear(frame),
            kind::DIRTY => self.dirty(frame),
            kind::SUMMARY => self.summary(frame),
            kind::FETCH => self.fetch(frame),
            kind::COPY => self.copy(frame),
            kind::LEVEL => self.level(frame),
            kind::WRITTEN => self.written(frame),
            kind::SCRUB => self.scrub(frame),
            kind::PULL => self.pull(frame),
            kind::CHANGES => self.changes(frame),
            kind::TOUCHED => self.touched(frame),
            kind::PEER_FETCH => self.peer_fetch(frame),
            _ => Err(Refused::Close),
        };
        done.unwrap_or_else(|refused| self.refusal(refused))
    }

    fn refusal(&mut self, refused: Refused) -> Outcome {
        match refused {
            Refused::Status(status) => {
                Outcome::Answer { status, head: Bytes::new(), payload: Bytes::new() }
            }
            Refused::BadBlock(block) => {
                let head = self.head(|out| out.put_u32_le(block));
                Outcome::Answer { status: Status::BadBlock, head, payload: Bytes::new() }
            }
            Refused::Park => Outcome::Park,
            Refused::Again => Outcome::Again,
            Refused::Close => Outcome::Close,
        }
    }

    fn head(&mut self, put: impl FnOnce(&mut BytesMut)) -> Bytes {
        put(&mut self.scratch.heads);
        self.scratch.heads.split().freeze()
    }

    pub(super) fn answer(&mut self, head: &impl Head, payload: Bytes) -> Outcome {
        let head = self.head(|out| head.put(out));
        Outcome::Answer { status: Status::Ok, head, payload }
    }

    /// The holder's session of the frame's channel, if it is current and of `epoch`.
    fn session(&self, frame: &Frame, epoch: u64) -> Step<Session> {
        let Some((session, current)) = self.sessions.get(self.connection, frame.channel) else {
            return Err(Refused::Status(Status::NoSession));
        };
        if self.store.is_deleted(&session.image) {
            return Err(Refused::Status(Status::Deleted));
        }
        let known = self.store.image(&session.image).map_or(0, |record| record.head.epoch);
        if (known > epoch || session.epoch != epoch) && !broken(Rule::EpochIsCurrent) {
            return Err(Refused::Status(Status::StaleEpoch));
        }
        if !current && !broken(Rule::SessionIsCurrent) {
            return Err(Refused::Status(Status::NoSession));
        }
        Ok(*session)
    }

    /// The layers of an image as its record names them, which is what its holder's session works on.
    fn chain(&self, image: &ImageId) -> Step<Chain> {
        let record = self.store.image(image);
        record.map(|r| r.chain.clone()).ok_or(Refused::Status(Status::NoRecord))
    }

    /// What a read on the frame's channel is of: a holder's image, or a reader's frozen layers.
    pub(super) fn readable(&self, frame: &Frame, epoch: u64) -> Step<(ImageId, Chain)> {
        if let Some(reader) = self.sessions.reader(self.connection, frame.channel) {
            return Ok((reader.image, self.snapshot_chain(reader)?));
        }
        let image = self.session(frame, epoch)?.image;
        Ok((image, self.chain(&image)?))
    }

    /// The layers that the reader's snapshot is seen through now: all is here that it holds, and it cannot change.
    /// Layers that are merged go from among them.
    fn snapshot_chain(&self, reader: &Reader) -> Step<Chain> {
        if self.store.is_deleted(&reader.image) {
            return Err(Refused::Status(Status::Deleted));
        }
        let Some(record) = self.store.image(&reader.image) else {
            return Err(Refused::Status(Status::NoRecord));
        };
        let counts = !record.blank && !self.store.is_distrusted(&reader.image);
        let layers = record.layers_of(&reader.snapshot).filter(|_| counts);
        let layers = layers.or_else(|| {
            broken(Rule::ReadersReadFrozenLayers).then(|| record.chain.from(reader.snapshot.layer))
        });
        layers.and_then(Chain::new).ok_or(Refused::Status(Status::NoLayers))
    }

    /// A shard of a layer that the image's record names, merged as far as the layer has a part in that: what
    /// nodes compare and copy does not depend on how far they are with it.
    fn key(&mut self, image: ImageId, layer: LayerId, shard: u64) -> Step<ShardKey> {
        if !self.chain(&image)?.has(layer) {
            return Err(Refused::Status(Status::Malformed));
        }
        if !broken(Rule::MergedBeforeCompared) && !self.store.finish_merge(&image, layer, shard)? {
            return Err(Refused::Again);
        }
        Ok(ShardKey { image, layer, shard })
    }

    /// Refuses a generation below the stored one; takes a higher one as it comes.
    fn check_generation(&mut self, session: &Session, generation: u64) -> Step<()> {
        let known = self.store.image(&session.image).map_or(0, |record| record.head.generation);
        if generation < known && !broken(Rule::GenerationIsCurrent) {
            return Err(Refused::Status(Status::StaleGeneration));
        }
        if generation > known {
            self.store.observe_generation(session.image, generation)?;
        }
        Ok(())
    }

    fn write(&mut self, frame: &Frame) -> Step {
        let mut checksums = std::mem::take(&mut self.scratch.checksums);
        let io = messages::take_write(frame.head.clone(), &mut checksums);
        let written = io.map_err(Refused::from).and_then(|io| {
            if io.length as usize != frame.payload.len() {
                return Err(Refused::Close);
            }
            let session = self.session(frame, io.epoch)?;
            self.check_generation(&session, io.generation)?;
            let chain = self.chain(&session.image)?;
            let operation = operation(session.image, &chain, &io);
            self.store.write(&operation, &checksums, frame.payload.clone())?;
            Ok(())
        });
        self.scratch.checksums = checksums;
        written.map(|()| done(frame))
    }

    fn zero(&mut self, frame: &Frame) -> Step {
        let io = Io::take(frame.head.clone())?;
        let session = self.session(frame, io.epoch)?;
        self.check_generation(&session, io.generation)?;
        let keep = frame.flags & flag::KEEP_ALLOCATED != 0;
        let chain = self.chain(&session.image)?;
        self.store.zero(&operation(session.image, &chain, &io), io.length, keep)?;
        Ok(done(frame))
    }

    fn read(&mut self, frame: &Frame) -> Step {
        let io = Io::take(frame.head.clone())?;
        let (image, chain) = self.readable(frame, io.epoch)?;
        let (first, blocks) = block_range(&io)?;
        if io.length as usize > PAYLOAD_BYTES_MAX {
            return Err(Refused::Close);
        }
        let scratch = &mut *self.scratch;
        scratch.states.clear();
        scratch.data.reserve(io.length as usize);
        let (states, data) = (&mut scratch.states, &mut scratch.data);
        self.store.read_blocks(&image, chain.layers(), io.shard, first, blocks, states, data)?;
        let payload = scratch.data.split().freeze();
        Ok(self.answer_blocks(payload))
    }

    fn read_into(&mut self, frame: &Frame) -> Step {
        let IoInto { io, at } = IoInto::take(frame.head.clone())?;
        let (first, blocks) = block_range(&io)?;
        let (image, chain) = self.readable(frame, io.epoch)?;
        let place = self.memory.as_mut().and_then(|memory| memory.room(at, io.length as usize));
        let mut placed = Placed::new(place.ok_or(Refused::Close)?);
        let states = &mut self.scratch.states;
        states.clear();
        let (layers, shard) = (chain.layers(), io.shard);
        self.store.read_blocks(&image, layers, shard, first, blocks, states, &mut placed)?;
        let bytes = placed.filled();
        let head = self.head_of_blocks();
        Ok(Outcome::Placed { head, bytes })
    }

    fn status(&mut self, frame: &Frame) -> Step {
        let io = Io::take(frame.head.clone())?;
        let (image, chain) = self.readable(frame, io.epoch)?;
        let (first, blocks) = block_range(&io)?;
        let mut states = Vec::with_capacity(blocks as usize);
        self.store.status(&image, chain.layers(), io.shard, first, blocks, &mut states)?;
        // Checksums are for readers of data; whoever asks for states has none to check.
        self.scratch.states.clear();
        self.scratch.states.extend(states.into_iter().map(|state| state.with(0)));
        Ok(self.answer_blocks(Bytes::new()))
    }

    fn answer_blocks(&mut self, payload: Bytes) -> Outcome {
        Outcome::Answer { status: Status::Ok, head: self.head_of_blocks(), payload }
    }

    fn head_of_blocks(&mut self) -> Bytes {
        let Scratch { states, heads, .. } = &mut *self.scratch;
        messages::put_blocks(heads, states.iter().copied());
        heads.split().freeze()
    }

    fn flush(&mut self, frame: &Frame) -> Step {
        let flush = Flush::take(frame.head.clone())?;
        let session = self.session(frame, flush.epoch)?;
        self.check_generation(&session, flush.generation)?;
        self.forget_flushed(&session, &flush)?;
        if broken(Rule::FlushIsDurable) {
            let number = messages::Number(self.store.flush_number());
            return Ok(self.answer(&number, Bytes::new()));
        }
        Ok(Outcome::AnswerDurable { with_number: true })
    }

    fn clear(&mut self, frame: &Frame) -> Step {
        let flush = Flush::take(frame.head.clone())?;
        let session = self.session(frame, flush.epoch)?;
        self.forget_flushed(&session, &flush)?;
        Ok(ok())
    }

    fn forget_flushed(&mut self, session: &Session, flush: &Flush) -> Step<()> {
        if flush.clear_sequence == 0 && flush.proof.is_empty() {
            return Ok(());
        }
        let mut names: Vec<&str> =
            self.store.peer_flush_numbers(&session.image).map(|(name, _)| name).collect();
        names.extend(flush.proof.iter().map(|(name, _)| name.as_str()));
        names.sort_unstable();
        names.dedup();
        if names.len() > PEERS_MAX || names.iter().any(|name| name.len() > NAME_BYTES_MAX) {
            return Err(Refused::Close);
        }
        let tag = Tag { epoch: flush.epoch, sequence: flush.clear_sequence };
        match self.store.clear(session.image, tag, &flush.proof) {
            // Nothing is lost: the map stays longer until the next clear.
            Ok(()) | Err(StoreError::LogFull) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn peek(&mut self, frame: &Frame) -> Step {
        let Peek(image) = Peek::take(frame.head.clone())?;
        if self.store.is_deleted(&image) {
            return Err(Refused::Status(Status::Deleted));
        }
        let Some(record) = self.store.image(&image).cloned() else {
            return Err(Refused::Status(Status::NoRecord));
        };
        let head = record.head;
        let peers = self.store.peer_flush_numbers(&image);
        let reply = PeekReply {
            record: messages::RecordHead {
                image,
                epoch: head.epoch,
                holder: head.holder,
                generation: head.generation,
                digest: head.digest,
                shard_bytes: head.shard_bytes,
            },
            dirty: self.store.dirty(&image).count() as u32,
            flush_number: self.store.flush_number(),
            distrusted: self.store.is_distrusted(&image),
            peers: peers.map(|(node, number)| (node.to_owned(), number)).collect(),
            emptied: self.store.emptied(&image),
        };
        Ok(self.answer(&reply, record.body))
    }

    fn record(&mut self, frame: &Frame) -> Step {
        let messages::Record { head: offered, blank, layers, snapshots, merging } =
            messages::Record::take(frame.head.clone())?;
        let chain = Chain::new(&layers).ok_or(Refused::Close)?;
        let head = RecordHead {
            epoch: offered.epoch,
            holder: offered.holder,
            generation: offered.generation,
            digest: offered.digest,
            shard_bytes: offered.shard_bytes,
        };
        let body = frame.payload.clone();
        let record = ImageRecord { head, blank, chain, snapshots, merging, body };
        let put = self.store.put_record(offered.image, record);
        if let Err(StoreError::RecordLower { stored } | StoreError::RecordConflict { stored }) =
            &put
        {
            let same_holder = (stored.epoch, stored.holder) == (head.epoch, head.holder);
            let later_epoch =
                stored.epoch > head.epoch || stored.epoch == head.epoch && !same_holder;
            let status = if later_epoch { Status::StaleEpoch } else { Status::StaleGeneration };
            return Err(Refused::Status(status));
        }
        put?;
        self.sessions.fence(&offered.image, offered.epoch);
        Ok(Outcome::AnswerDurable { with_number: false })
    }

    fn attach(&mut self, frame: &Frame) -> Step {
        let attach = Attach::take(frame.head.clone())?;
        if self.store.is_deleted(&attach.image) {
            return Err(Refused::Status(Status::Deleted));
        }
        let Some(record) = self.store.image(&attach.image) else {
            return Err(Refused::Status(Status::NoRecord));
        };
        let known = (record.head.epoch, record.head.holder);
        if known != (attach.epoch, attach.holder) {
            return Err(Refused::Status(Status::StaleEpoch));
        }
        let session = Session { image: attach.image, epoch: attach.epoch };
        match self.sessions.begin(self.connection, frame.channel, session) {
            true => Ok(ok()),
            false => Err(Refused::Status(Status::NoSession)),
        }
    }

    fn attach_reader(&mut self, frame: &Frame) -> Step {
        let AttachReader { image, snapshot } = AttachReader::take(frame.head.clone())?;
        let reader = Reader { image, snapshot };
        self.snapshot_chain(&reader)?;
        match self.sessions.begin_reader(self.connection, frame.channel, reader) {
            true => Ok(ok()),
            false => Err(Refused::Status(Status::NoSession)),
        }
    }

    fn detach(&mut self, frame: &Frame) -> Step {
        messages::Session::take(frame.head.clone())?;
        self.sessions.end(self.connection, frame.channel);
        Ok(ok())
    }

    fn confirm(&mut self, frame: &Frame) -> Step {
        let asked = messages::Session::take(frame.head.clone())?;
        self.readable(frame, asked.epoch)?;
        Ok(ok())
    }

    fn dirty(&mut self, frame: &Frame) -> Step {
        let asked = DirtyFrom::take(frame.head.clone())?;
        let image = self.session(frame, asked.epoch)?.image;
        let from = self.store.dirty(&image).filter(|(shard, _)| *shard >= asked.from_shard);
        let mut entries: Vec<DirtyEntry> = from
            .take(DIRTY_ENTRIES_MAX + 1)
            .map(|(shard, entry)| DirtyEntry {
                shard,
                last: entry.last,
                generation: entry.generation,
                sticky: entry.sticky,
            })
            .collect();
        let more = entries.len() > DIRTY_ENTRIES_MAX;
        entries.truncate(DIRTY_ENTRIES_MAX);
        Ok(self.answer(&DirtyReply { entries, more }, Bytes::new()))
    }

    /// The asked blocks of a shard's summary, and its generation.
    fn blocks_of(&mut self, frame: &Frame) -> Step<(ShardKey, ShardRange, BlocksReply)> {
        let asked = ShardRange::take(frame.head.clone())?;
        let image = self.session(frame, asked.epoch)?.image;
        let key = self.key(image, asked.layer, asked.shard)?;
        let reply = self.summary_of(&key, asked.first_block, asked.blocks)?;
        Ok((key, asked, reply))
    }

    fn summary_of(&mut self, key: &ShardKey, first: u32, blocks: u32) -> Step<BlocksReply> {
        let summary = self.store.summary(key)?;
        let end = first.checked_add(blocks).ok_or(Refused::Close)?;
        let range = first as usize..end as usize;
        let blocks = summary.blocks.get(range).ok_or(Refused::Close)?;
        let blocks =
            blocks.iter().map(|block| (block.state.with(block.checksum), block.tag)).collect();
        Ok(BlocksReply { generation: summary.generation, blocks })
    }

    fn summary(&mut self, frame: &Frame) -> Step {
        let (_, _, reply) = self.blocks_of(frame)?;
        Ok(self.answer(&reply, Bytes::new()))
    }

    fn fetch(&mut self, frame: &Frame) -> Step {
        let (key, asked, reply) = self.blocks_of(frame)?;
        if asked.blocks > FETCH_BLOCKS_MAX {
            return Err(Refused::Close);
        }
        self.answer_fetch(&key, (asked.first_block, asked.blocks), &reply)
    }

    fn answer_fetch(
        &mut self,
        key: &ShardKey,
        (first, blocks): (u32, u32),
        reply: &BlocksReply,
    ) -> Step {
        let scratch = &mut *self.scratch;
        scratch.states.clear();
        let (states, data) = (&mut scratch.states, &mut scratch.data);
        self.store.read_blocks(&key.image, &[key.layer], key.shard, first, blocks, states, data)?;
        let payload = scratch.data.split().freeze();
        Ok(self.answer(reply, payload))
    }

    fn copy(&mut self, frame: &Frame) -> Step {
        let copy = Copy::take(frame.head.clone())?;
        let session = self.session(frame, copy.epoch)?;
        self.check_generation(&session, copy.generation)?;
        let key = self.key(session.image, copy.layer, copy.shard)?;
        let blocks = copy_blocks(copy.indexes.iter().copied(), &copy.blocks);
        self.store.copy(&key, &blocks, frame.payload.clone(), copy.shard_generation)?;
        Ok(ok())
    }

    fn level(&mut self, frame: &Frame) -> Step {
        let level = Level::take(frame.head.clone())?;
        let image = self.session(frame, level.epoch)?.image;
        self.store.mark_level(image, &level.shards)?;
        Ok(ok())
    }
}

impl Requests<'_> {
    /// A page of the shards that a node which was left behind has missed.
    fn written(&mut self, frame: &Frame) -> Step {
        let asked = WrittenAbove::take(frame.head.clone())?;
        let image = self.session(frame, asked.epoch)?.image;
        let chain = self.chain(&image)?;
        let from = WrittenCursor { place: asked.place, shard: asked.shard };
        let page = self.store.written_above(&image, chain.layers(), asked.generation, from)?;
        let next = page.next.map(|next| (next.place, next.shard));
        Ok(self.answer(&WrittenReply { next, shards: page.shards }, Bytes::new()))
    }
}

impl Requests<'_> {
    /// Reads and verifies blocks, and sums them up.
    fn scrub(&mut self, frame: &Frame) -> Step {
        let asked = ShardRange::take(frame.head.clone())?;
        let image = self.session(frame, asked.epoch)?.image;
        if asked.blocks as usize > SCRUB_BLOCKS_MAX {
            return Err(Refused::Close);
        }
        let key = self.key(image, asked.layer, asked.shard)?;
        let found = self.store.scrub(&key, asked.first_block, asked.blocks)?;
        let reply = ScrubReply {
            metadata_rewritten: found.metadata_rewritten,
            data_blocks: found.data_blocks,
            digest: found.digest,
            rotten: found.rotten,
        };
        Ok(self.answer(&reply, Bytes::new()))
    }
}

// Copies from node to node

impl Requests<'_> {
    /// A holder orders this node to fetch blocks from another one.
    fn pull(&mut self, frame: &Frame) -> Step {
        let pull = Pull::take(frame.head.clone())?;
        let session = self.session(frame, pull.epoch)?;
        self.check_generation(&session, pull.generation)?;
        // What could never land is not fetched. Nor does a node that has told that a merged layer is empty have
        // something of it arrive late: copies through the holder come in order.
        let record = self.store.image(&session.image);
        let counts = |record: &ImageRecord| {
            record.head.generation == pull.generation && record.merge_of(pull.layer).is_none()
        };
        if !record.is_some_and(counts) {
            return Err(Refused::Status(Status::Cancelled));
        }
        let key = self.key(session.image, pull.layer, pull.shard)?;
        let (serial, _) =
            self.sessions.current(&session.image).ok_or(Refused::Status(Status::NoSession))?;
        Ok(Outcome::Pull(Box::new(PullOrder {
            connection: self.connection,
            channel: frame.channel,
            tag: frame.tag,
            session: serial,
            key,
            epoch: pull.epoch,
            generation: pull.generation,
            blocks: pull.first_block..pull.first_block + pull.blocks,
            source: pull.source,
        })))
    }

    /// Applies what another node has given, where the order for it still counts.
    pub(crate) fn land(&mut self, order: &PullOrder, given: &Frame) -> Outcome {
        self.apply_pull(order, given).unwrap_or_else(|refused| match refused {
            // The source's data is damaged, or not what was asked for: there are other ways to it.
            Refused::Close | Refused::Status(Status::BadChecksum | Status::Malformed) => {
                self.refusal(Refused::Status(Status::Unreachable))
            }
            refused => self.refusal(refused),
        })
    }

    fn apply_pull(&mut self, order: &PullOrder, given: &Frame) -> Step {
        let counts = self.is_current(order) || broken(Rule::PullsEndWithTheirSession);
        if !counts || self.store.is_deleted(&order.key.image) {
            return Err(Refused::Status(Status::Cancelled));
        }
        let key = self.key(order.key.image, order.key.layer, order.key.shard)?;
        let reply = BlocksReply::take(given.head.clone())?;
        if reply.blocks.len() != order.blocks.len() {
            return Err(Refused::Close);
        }
        let blocks = copy_blocks(order.blocks.clone(), &reply.blocks);
        self.store.copy(&key, &blocks, given.payload.clone(), reply.generation)?;
        Ok(self.answer(&messages::Number(given.payload.len() as u64), Bytes::new()))
    }

    /// Whether the session, the epoch and the generation are those that the order was given in.
    fn is_current(&self, order: &PullOrder) -> bool {
        let record = self.store.image(&order.key.image).map(|record| record.head);
        let stored = record.map(|head| (head.epoch, head.generation));
        self.sessions.current(&order.key.image) == Some((order.session, order.epoch))
            && stored == Some((order.epoch, order.generation))
    }

    /// Another node wants blocks that the holder has ordered it to take from here.
    fn peer_fetch(&mut self, frame: &Frame) -> Step {
        let asked = PeerFetch::take(frame.head.clone())?;
        if self.store.is_deleted(&asked.image) {
            return Err(Refused::Status(Status::Deleted));
        }
        if !broken(Rule::PeersAskUnderTheRecord) {
            self.check_peer(&asked)?;
        }
        let key = self.key(asked.image, asked.layer, asked.shard)?;
        let reply = self.summary_of(&key, asked.first_block, asked.blocks)?;
        self.answer_fetch(&key, (asked.first_block, asked.blocks), &reply)
    }

    /// Just what the holder knows of this node: its session, and so its instance, and the membership.
    fn check_peer(&self, asked: &PeerFetch) -> Step<()> {
        let Some(record) = self.store.image(&asked.image) else {
            return Err(Refused::Status(Status::NoRecord));
        };
        let session = self.sessions.current(&asked.image).map(|(_, epoch)| epoch);
        Err(Refused::Status(if record.head.epoch != asked.epoch {
            Status::StaleEpoch
        } else if record.head.generation != asked.generation {
            Status::StaleGeneration
        } else if session != Some(asked.epoch) {
            Status::NoSession
        } else if record.blank || self.store.is_distrusted(&asked.image) {
            Status::NoLayers
        } else {
            return Ok(());
        }))
    }
}

fn copy_blocks(indexes: impl Iterator<Item = u32>, blocks: &[(Block, Tag)]) -> Vec<CopyBlock> {
    let blocks = indexes.zip(blocks).map(|(block, (content, tag))| {
        let (state, checksum) = BlockState::of(*content);
        CopyBlock { block, state, tag: *tag, checksum }
    });
    blocks.collect()
}

fn done(frame: &Frame) -> Outcome {
    match frame.flags & flag::FUA {
        0 => ok(),
        _ => Outcome::AnswerDurable { with_number: false },
    }
}

fn operation<'a>(image: ImageId, chain: &'a Chain, io: &Io) -> WriteOp<'a> {
    let stamp = Stamp { epoch: io.epoch, generation: io.generation, sequence: io.sequence };
    WriteOp { image, layers: chain.layers(), shard: io.shard, offset: io.offset, stamp }
}

/// First block and number of blocks of a range that consists of whole blocks.
pub(super) fn block_range(io: &Io) -> Step<(u32, u32)> {
    let whole = io.offset.is_multiple_of(BLOCK_BYTES) && io.length.is_multiple_of(BLOCK_BYTES);
    if !whole || io.length == 0 {
        return Err(Refused::Close);
    }
    Ok((io.offset / BLOCK_BYTES, io.length / BLOCK_BYTES))
}
